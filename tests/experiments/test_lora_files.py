"""Adapters in files are merged, inspected and extracted from the command line, or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from permjax.cli import main
from permjax.experiments import lora_files
from permjax.experiments.lora_files import LoraMergeOptions
from permjax.experiments.lora_files_report import heat_map, place_of, short_names, without_common
from permjax.experiments.progress import Progress
from permjax.io.checkpoint import open_checkpoint, save_checkpoint
from permjax.lora.formats import open_adapter, save_adapter
from permjax.lora.pool import Factors

SIZES = {f"layers.{i}.{name}": size for i in range(2) for name, size in {"q_proj": (8, 9), "up_proj": (12, 8)}.items()}
HIDDEN = Progress(visible=False)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter(seed, rank):
    rng = np.random.default_rng(seed)
    return {
        name: Factors(*(rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n), (m, rank))))
        for name, (m, n) in SIZES.items()
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Adapters `a` (rank 2) and `b` (rank 3) in a folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_adapter(name, adapter(seed, seed + 2), like=())
    return tmp_path


def run(*arguments):
    return main(["lora", *arguments, *(() if arguments[0] == "inspect" else ("--no-progress",))])


def merge(out, **options):
    """Merge `a` and `b` without a report."""
    return lora_files.merge(LoraMergeOptions(("a", "b"), out, **{"method": "truncate"} | options), HIDDEN)


def delta(factors):
    return factors.b.astype(float) @ factors.a.astype(float)


def sums(weights=(0.5, 0.5)):
    a, b = adapter(0, 2), adapter(1, 3)
    return {name: weights[0] * delta(a[name]) + weights[1] * delta(b[name]) for name in SIZES}


def tail(matrix, rank):
    return np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:])


# merging


def test_the_merged_adapter_is_the_best_of_its_rank_and_the_report_says_so(folder, capsys):
    assert run("merge", "a", "b", "-o", "out", "--method", "truncate", "--rank", "4", "--weights=2,-0.5") == 0
    found = open_adapter("out")
    assert {info.rank for info in found.values()} == {4}
    assert {info.scale for info in found.values()} == {1.0}
    square, whole = 0.0, 0.0
    for name, total in sums((2, -0.5)).items():
        error = np.linalg.norm(delta(found.read(name)) - total)
        assert error == pytest.approx(tail(total, 4), rel=1e-3)
        square, whole = square + error**2, whole + np.linalg.norm(total) ** 2
    metrics = json.loads(Path("out/report/metrics.json").read_text())
    assert metrics["error_to_sum"] == pytest.approx(np.sqrt(square / whole), rel=1e-3)
    assert metrics["error_to_sum"] == pytest.approx(metrics["best_error"], rel=1e-3)
    assert (metrics["modules"], metrics["adapters"], metrics["rank_max"]) == (4, 2, 4)
    printed = capsys.readouterr()
    assert "cosine" in printed.out
    assert "Report: out/report/report.html" in printed.out
    page = Path("out/report/report.html").read_text()
    assert "permjax lora merge a b -o out" in page
    assert "Error to the weighted sum" in page


def test_lego_is_short_for_lora_lego_and_its_clusters_are_reported(folder):
    assert run("merge", "a", "b", "-o", "out") == 0
    metrics = json.loads(Path("out/report/metrics.json").read_text())
    assert 0 < metrics["cluster_purity"] <= 1
    assert "merged by lora_lego" in Path("out/report/report.html").read_text()


def test_the_same_command_gives_the_same_bytes_and_writes_over_what_it_wrote(folder):
    save_adapter("a", adapter(0, 3), like=())
    arguments = ("--method", "dare", "--rank", "3", "--set", "density=0.5", "--seed", "7")
    for out in ("one", "one"):
        assert run("merge", "a", "b", "-o", out, *arguments) == 0
    for out, seed in (("two", 7), ("other", 8)):
        merge(out, method="dare", rank="3", settings=("density=0.5",), seed=seed)
    for file in (WEIGHTS, CONFIG):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    assert Path("one", WEIGHTS).read_bytes() != Path("other", WEIGHTS).read_bytes()


def test_modules_are_the_same_when_few_are_read_at_a_time(folder, monkeypatch):
    merge("at_once", rank="2")
    monkeypatch.setattr(lora_files, "_CHUNK", 1)
    merge("one_by_one", rank="2")
    one, two = open_adapter("at_once"), open_adapter("one_by_one")
    assert list(one) == list(two)
    for name in one:
        np.testing.assert_allclose(delta(one.read(name)), delta(two.read(name)), rtol=1e-4, atol=1e-5)


def test_auto_takes_the_smallest_rank_that_holds_the_energy(folder):
    merge("out", rank="auto:0.9")
    (rank,) = {info.rank for info in open_adapter("out").values()}
    totals = list(sums().values())
    lost = [sum(tail(x, k) ** 2 for x in totals) / sum(tail(x, 0) ** 2 for x in totals) for k in range(6)]
    assert lost[rank] <= 0.1 < lost[rank - 1]


def test_a_budget_is_spent_where_the_singular_values_are_large(folder):
    merge("out", rank="budget:9")
    found = open_adapter("out")
    ranks = {name: info.rank for name, info in found.items()}
    assert sum(ranks.values()) == 9
    kept = [
        np.linalg.svd(total, compute_uv=False)[ranks[name] - 1] for name, total in sums().items() if ranks[name] > 1
    ]
    lost = [np.linalg.svd(total, compute_uv=False)[ranks[name]] for name, total in sums().items()]
    assert max(lost) <= min(kept)
    for name, total in sums().items():
        assert np.linalg.norm(delta(found.read(name)) - total) == pytest.approx(tail(total, ranks[name]), rel=1e-3)


def test_an_adapter_without_a_module_takes_part_with_zeros(folder):
    some = {name: one for name, one in adapter(1, 3).items() if "up_proj" not in name}
    save_adapter("b", some, like=())
    merge("out", method="concat")
    found = open_adapter("out")
    np.testing.assert_allclose(
        delta(found.read("layers.0.up_proj")), delta(adapter(0, 2)["layers.0.up_proj"]) / 2, 1e-4
    )


def test_a_file_of_kohyas_style_gets_its_report_beside_it(folder):
    arguments = ("--method", "truncate", "--style", "kohya", "--dtype", "float16")
    assert run("merge", "a", "b", "-o", "out.safetensors", *arguments) == 0
    assert open_adapter("out.safetensors").style == "kohya"
    assert open_checkpoint("out.safetensors")["lora_unet_layers_0_q_proj.lora_up.weight"].dtype == np.float16
    assert Path("out.safetensors.report/report.html").is_file()


# refusing


def truncate():
    Path("b", WEIGHTS).write_bytes(Path("b", WEIGHTS).read_bytes()[:-9])


def empty():
    Path("b", WEIGHTS).write_bytes(b"")


def tensors(change):
    values = open_checkpoint(Path("b", WEIGHTS)).load()
    change(values)
    Path("b", WEIGHTS).unlink()
    save_checkpoint(Path("b", WEIGHTS), values)


KEY = "base_model.model.layers.0.q_proj.lora_B.weight"


def without_b():
    tensors(lambda values: values.pop(KEY))


def wrong_ranks():
    tensors(lambda values: values.update({KEY: values[KEY][:, :2].copy()}))


def other_base():
    tensors(lambda values: values.update({KEY: values[KEY][:5].copy()}))


def not_finite():
    tensors(lambda values: values[KEY].reshape(-1).__setitem__(0, np.nan))


def leaving_shard():
    Path("b", WEIGHTS).rename("outside.safetensors")
    places = dict.fromkeys(open_checkpoint("outside.safetensors"), "../outside.safetensors")
    Path("b", "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def configured(**values):
    def change():
        config = json.loads(Path("b", CONFIG).read_text())
        Path("b", CONFIG).write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, WEIGHTS),
        (empty, WEIGHTS),
        (without_b, "layers.0.q_proj"),
        (wrong_ranks, "layers.0.q_proj"),
        (other_base, "merge adapters of one base model"),
        (not_finite, "not finite"),
        (leaving_shard, "outside.safetensors"),
        (configured(twist=3), "'twist'"),
        (configured(use_dora=True), "use_dora"),
    ],
)
def test_a_file_that_cannot_be_merged_is_refused_in_one_line(folder, capsys, damage, words):
    Path("out").mkdir()
    Path("out", WEIGHTS).write_text("old")
    damage()
    assert run("merge", "a", "b", "-o", "out", "--method", "truncate") == 2
    assert_refused(capsys, words)
    assert [file.name for file in Path("out").iterdir()] == [WEIGHTS]
    assert Path("out", WEIGHTS).read_text() == "old"


def assert_refused(capsys, words):
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.startswith("permjax: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "lgo"), "no method 'lgo' (nearest: 'lego"),
        (("--method", "regmean"), "merge_loras"),
        (("--method", "ties", "--set", "densty=0.3"), "unknown key 'densty' (nearest: 'density')"),
        (("--method", "ties", "--set", "density=much"), "must be float"),
        (("--method", "ties", "--set", "density"), "key=value"),
        (("--method", "concat", "--rank", "2"), "rank 2"),
        (("--rank", "0"), "--rank 0"),
        (("--rank", "auto:1.5"), "--rank auto:1.5"),
        (("--rank", "most"), "--rank most"),
        (("--rank", "budget:3"), "4 modules need"),
        (("--weights", "1,2,3"), "--weights 1,2,3: 2 adapters need"),
        (("--weights", "0,0"), "not all of them 0"),
        (("--style", "kohya"), "no place for an adapter of style kohya"),
        (("-o", "a"), "would be written over a"),
        (("-o", "out.safetensors"), "no place for an adapter of style peft"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(folder, capsys, arguments, words):
    before = {path: path.read_bytes() for path in Path("a").iterdir()}
    assert run("merge", "a", "b", *(() if "-o" in arguments else ("-o", "out")), *arguments) == 2
    assert_refused(capsys, words)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert {path: path.read_bytes() for path in Path("a").iterdir()} == before


def test_force_ignores_unknown_keys_only(folder, capsys):
    configured(twist=3)()
    merge("out", force=True)
    configured(use_dora=True)()
    assert run("merge", "a", "b", "-o", "out", "--method", "truncate", "--force") == 2


# inspecting


def test_inspect_prints_a_line_for_every_module_and_writes_a_page_if_asked(folder, capsys):
    assert run("inspect", "b") == 0
    printed = capsys.readouterr().out
    for name, (m, n) in SIZES.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(name)]
        assert f"{m} x {n}" in line
    assert "rank 3" in printed
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]
    assert run("inspect", "b", "-o", "page") == 0
    metrics = json.loads(Path("page/metrics.json").read_text())
    norms = [np.linalg.norm(delta(one)) for one in adapter(1, 3).values()]
    assert metrics["norm"] == pytest.approx(np.linalg.norm(norms), rel=1e-4)
    assert (metrics["rank_max"], metrics["dead_ranks"]) == (3, 0)


def test_inspecting_what_is_no_adapter_is_refused(folder, capsys):
    assert run("inspect", "nothing") == 2
    assert_refused(capsys, "nothing")


# extracting


def write_models(config=None, transposed=False):
    """A model before and after training; returns the changes by weight."""
    rng = np.random.default_rng(0)
    base = {
        "h.0.attn.c_attn.weight": rng.standard_normal((6, 18)),
        "h.0.conv.weight": rng.standard_normal((5, 4, 3, 3)),
        "h.0.same.weight": rng.standard_normal((4, 4)),
        "h.0.norm.weight": rng.standard_normal(6),
        "wte.weight": rng.standard_normal((11, 6)),
    }
    base = {name: values.astype(np.float32) for name, values in base.items()}
    changed = ("h.0.attn.c_attn.weight", "h.0.conv.weight", "h.0.norm.weight", "wte.weight")
    tuned = {n: x + (0.1 * rng.standard_normal(x.shape).astype("f") if n in changed else 0) for n, x in base.items()}
    for name, values in {"base": base, "tuned": tuned}.items():
        Path(name).mkdir(exist_ok=True)
        save_checkpoint(name, values)
        if config:
            Path(name, "config.json").write_text(json.dumps(config))
    return {name: (tuned[name] - base[name]).astype(float) for name in base}


@pytest.mark.parametrize("model", ["gpt2", "other"])
def test_the_extracted_adapter_is_the_best_of_its_rank(folder, capsys, model):
    changes = write_models({"model_type": model})
    assert run("extract", "base", "tuned", "-o", "out", "--rank", "3") == 0
    found = open_adapter("out")
    assert {name: info.kind for name, info in found.items()} == {"h.0.attn.c_attn": "linear", "h.0.conv": "conv"}
    for name in found:
        change = changes[f"{name}.weight"]
        matrix = change.T if model == "gpt2" and "attn" in name else change.reshape(len(change), -1)
        assert np.linalg.norm(delta(found.read(name)) - matrix) == pytest.approx(tail(matrix, 3), rel=1e-3)
    assert "Warning: 2 more tensors have changed" in capsys.readouterr().out
    assert json.loads(Path("out/report/metrics.json").read_text())["left_out"] == 2


def test_targets_are_names_patterns_or_ends_of_names(folder):
    write_models()
    for number, pattern in enumerate(("conv", "h.0.conv.weight", "*.conv*")):
        assert run("extract", "base", "tuned", "-o", f"out{number}", "--rank", "1", "--targets", pattern) == 0
        assert list(open_adapter(f"out{number}")) == ["h.0.conv"]


def missing():
    values = open_checkpoint("tuned").load()
    values.pop("h.0.norm.weight")
    save_checkpoint("tuned", values)


def nothing_changed():
    save_checkpoint("tuned", open_checkpoint("base").load())


@pytest.mark.parametrize(
    ("damage", "arguments", "words"),
    [
        (missing, (), "no tensor 'h.0.norm.weight'"),
        (nothing_changed, (), "No target weight differs"),
        (None, ("--rank", "0"), "--rank 0"),
        (None, ("--targets", "q_proj"), "--targets q_proj"),
        (None, ("--targets", "wte"), "--targets wte"),
        (None, ("-o", "base"), "would be written over"),
        (None, ("-o", "new.safetensors"), "no place"),
    ],
)
def test_what_cannot_be_extracted_is_refused_in_one_line(folder, capsys, damage, arguments, words):
    write_models()
    if damage:
        damage()
    given = {"-o": "out", "--rank": "2"} | dict([arguments] if arguments else [])
    assert run("extract", "base", "tuned", *(x for pair in given.items() for x in pair)) == 2
    assert_refused(capsys, words)
    assert not Path("out").exists()
    assert not Path("base", CONFIG).exists()


# heat maps and names


def test_modules_have_a_place_by_layer_and_projection():
    assert place_of("model.layers.3.self_attn.q_proj") == ("model.layers.3", "self_attn.q_proj")
    assert place_of("lora_unet_down_blocks_0_attn_1_to_q") == ("lora_unet_down_blocks_0_attn_1", "to_q")
    assert place_of("blocks.2.attn.to_out.0") == ("blocks.2", "attn.to_out.0")
    assert place_of("classifier") is None
    assert without_common(["model.layers.1", "model.layers.10"]) == ["1", "10"]
    assert without_common(["model.layers.1"]) == ["1"]


def test_a_heat_map_leaves_cells_of_missing_modules_empty_and_shows_the_worst_layers():
    found = {f"layers.{i}.{name}": i for i in range(60) for name in ("q", "v") if (i, name) != (59, "v")}
    drawn = heat_map("x", "X", "Caption.", found, float)
    assert drawn.values.shape == (48, 2)
    assert list(drawn.rows) == [str(i) for i in range(12, 60)]
    assert np.isnan(drawn.values[-1, 1])
    assert "48 layers" in drawn.caption
    assert heat_map("x", "X", "Caption.", {"classifier": 1}, float) is None


def test_adapters_of_one_name_are_numbered():
    assert short_names(["x/a", "y/a", "y/b"]) == ["1-a", "2-a", "b"]
