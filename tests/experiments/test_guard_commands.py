"""From the command line: language models are checked on text, and merges that have collapsed are not written."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.action import permute
from permjax.cli import main
from permjax.experiments.architectures import FilesError
from permjax.experiments.lora_places import place_of
from permjax.io.checkpoint import open_checkpoint, save_checkpoint
from permjax.lora.formats import save_adapter
from permjax.lora.keys import ModuleInfo
from permjax.lora.pool import Factors
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import random_permutations
from permjax.symmetry.trace import trace_spec

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 256,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 2,
    "n_inner": 12,
}
NET = build(config_from_dict(GPT2))
APPLY = jax.jit(NET.apply)
LINES = ["Ann sings in the evening.", "Bob was here.", "It rains, as it did."]
MLP = "h.0.mlp.c_proj.weight"


def draw():
    """Weights that all show."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(NET.init, jax.random.key(0))
    return {
        name: (rng.standard_normal(x.shape) * 0.3 + (len(x.shape) < 2)).astype(np.float32) for name, x in like.items()
    }


A = draw()
LOUD = {**A, "wte.weight": 40 * A["wte.weight"]}
BROKEN = {**A, MLP: np.where(np.eye(12, 8) > 0, np.float32(np.nan), A[MLP])}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models of bytes in files of one folder, with a text beside them."""
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(GPT2))
    for name, params in {"a": A, "loud": LOUD, "broken": BROKEN}.items():
        save_checkpoint(f"{name}.safetensors", params)
    Path("text.txt").write_text("\n".join(LINES))
    return tmp_path


def check(*arguments):
    return main(["check", *arguments])


def numbers(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def losses(params, line):
    """-log p of every byte of a line but the first, in float64."""
    ids = list(line.encode())[: GPT2["n_positions"]]
    row = jnp.asarray([ids + [0] * (GPT2["n_positions"] - len(ids))])
    logits = np.asarray(APPLY(jax.tree.map(jnp.asarray, params), row), np.float64)[0, : len(ids) - 1]
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


# checking


def test_a_check_tells_the_three_perplexities_by_corpus(folder, capsys):
    records = [{"Corpus": "mine", "Text": line} for line in LINES] + [{"Corpus": "other", "Text": "xyzzy plugh"}]
    Path("text.json").write_text(json.dumps(records))
    assert check("a.safetensors", "--text", "text.json", "-o", "report") == 0
    found, all_losses = numbers("report"), [losses(A, record["Text"]) for record in records]
    whole = sum(x.sum() for x in all_losses)
    assert found["verdict"] == "accepted"
    assert found["ppl_sentence_mean"] == pytest.approx(np.mean([np.exp(x.mean()) for x in all_losses]), rel=1e-4)
    assert found["ppl_token"] == pytest.approx(np.exp(whole / sum(map(len, all_losses))), rel=1e-4)
    assert found["ppl_input_token"] == pytest.approx(np.exp(whole / sum(len(x) + 1 for x in all_losses)), rel=1e-4)
    assert check("a.safetensors", "--text", "text.json") == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.startswith(("mine", "other"))}
    assert (rows["mine"][1], rows["other"][1]) == ("3", "1")
    assert float(rows["other"][3].replace(",", "")) == pytest.approx(np.exp(all_losses[-1].mean()), rel=1e-2)


def test_a_permuted_copy_passes_against_the_model_and_a_loud_or_broken_one_does_not(folder, capsys):
    spec = trace_spec(NET.apply, A, *NET.example_inputs(1), verify=False)
    save_checkpoint("moved.safetensors", permute(spec, random_permutations(spec, jax.random.key(1)), A))
    against = ("--text", "text.txt", "--against", "a.safetensors")
    assert check("moved.safetensors", *against, "--limit", "1.001", "-o", "report") == 0
    found = numbers("report")
    assert found["ratio_worst"] == pytest.approx(1, rel=1e-4)
    assert abs(found["kl_worst"]) < 1e-5
    assert found["energy_worst"] > 0.1, "units that moved change what layers compute"
    assert check("a.safetensors", *against, "-o", "report") == 0
    assert (numbers("report")["energy_worst"], numbers("report")["ratio_worst"]) == (0, 1)
    capsys.readouterr()
    for name, says in {"loud": "the perplexity of text is", "broken": "weights are not finite"}.items():
        assert check(f"{name}.safetensors", *against, "-o", name) == 3
        printed = capsys.readouterr()
        assert printed.err.startswith(f"permjax: The guard refuses {name}.safetensors: {says}")
        assert printed.err.count("\n") == 1
        assert "Too much" in printed.out
        assert "Perplexity" in Path(name, "report.html").read_text()
        assert numbers(name)["verdict"] == "refused"


def test_a_model_that_is_not_finite_fails_by_itself(folder, capsys):
    assert check("broken.safetensors", "--text", "text.txt") == 3
    assert "its perplexity is not finite" in capsys.readouterr().err


def test_the_tokenizer_beside_the_model_is_used_and_must_fit(folder, capsys):
    pytest.importorskip("tokenizers")
    from permjax.io.tokenizers import train_byte_bpe

    bpe = train_byte_bpe(["a"], 256)  # bytes, but with other numbers
    bpe.inner.save("tokenizer.json")
    assert check("a.safetensors", "--text", "text.txt", "-o", "other") == 0
    Path("tokenizer.json").rename("named.json")
    assert check("a.safetensors", "--text", "text.txt", "-o", "bytes") == 0
    assert check("a.safetensors", "--text", "text.txt", "-o", "named", "--tokenizer", "named.json") == 0
    assert numbers("named")["ppl_token"] == numbers("other")["ppl_token"] != numbers("bytes")["ppl_token"]
    train_byte_bpe(LINES * 4, 270).inner.save("large.json")
    capsys.readouterr()
    assert check("a.safetensors", "--text", "text.txt", "--tokenizer", "large.json") == 2
    assert "but the model knows 256" in capsys.readouterr().err


def other_vocabulary():
    config = GPT2 | {"vocab_size": 9}
    Path("config.json").write_text(json.dumps(config))
    save_checkpoint("a.safetensors", build(config_from_dict(config)).init(jax.random.key(0)))


def no_package(monkeypatch):
    Path("tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)


def other_architecture():
    config = {"model_type": "mlp", "input_shape": [4], "hidden": [8], "classes": 3}
    Path("config.json").write_text(json.dumps(config))
    params = build(config_from_dict(config)).init(jax.random.key(0))["params"]
    save_checkpoint("a.safetensors", {f"params/{m}/{n}": x for m, leaves in params.items() for n, x in leaves.items()})


@pytest.mark.parametrize(
    ("prepare", "arguments", "says"),
    [
        (lambda _: None, (), "no text to check the model on"),
        (lambda _: None, ("--text", "none.txt"), "none.txt: this needs a text file"),
        (lambda _: None, ("--text", "text.txt", "--tokenizer", "none.json"), "no tokenizer at none.json"),
        (lambda _: None, ("--text", "text.txt", "--limit", "0"), "--limit and --sentences must be above 0"),
        (
            lambda _: Path("text.txt").write_text("a\nb"),
            ("--text", "text.txt"),
            "Corpus 'text': There is no sentence of two",
        ),
        (
            lambda _: other_vocabulary(),
            ("--text", "text.txt"),
            "no tokenizer.json beside a.safetensors, whose model has 9",
        ),
        (lambda _: other_architecture(), ("--text", "text.txt"), "is no language model"),
        (no_package, ("--text", "text.txt"), "The package 'tokenizers' is missing; install the extra `text`"),
    ],
)
def test_what_cannot_be_checked_is_told_in_a_line(folder, capsys, monkeypatch, prepare, arguments, says):
    prepare(monkeypatch)
    assert check("a.safetensors", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


# merging

TOY = """
import jax
import jax.numpy as jnp

def apply(params, tokens):
    hidden = jax.nn.relu(jnp.take(params["table"], tokens, axis=0) @ params["up"])
    return jnp.einsum("sth,vh->stv", hidden, params["down"])

def build():
    return apply, (jnp.zeros((2, 16), jnp.int32),)
"""


def toy(loud=1.0, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = {"table": (256, 4), "up": (4, 6), "down": (256, 6)}
    params = {name: (rng.standard_normal(shape) / 3).astype(dtype) for name, shape in shapes.items()}
    return {**params, "table": (loud * params["table"]).astype(dtype)}


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Models that look at one byte, one of them too sure of itself, with a text beside them."""
    monkeypatch.chdir(tmp_path)
    Path("toy_of_the_guard.py").write_text(TOY)
    Path("text.txt").write_text("\n".join(LINES))
    made = {"a": toy(), "loud": toy(20), "huge": toy(1e6), "half": toy(dtype=np.float16)}
    for name, params in made.items():
        save_checkpoint(f"{name}.safetensors", params)
    return tmp_path


def merge(one, two, *arguments):
    models = (f"{one}.safetensors", f"{two}.safetensors", "--arch", "toy_of_the_guard:build")
    return main(["merge", "--no-progress", "-o", "out.safetensors", *models, *arguments])


def test_a_merge_that_the_guard_accepts_is_written_and_tells_the_ratio(toys):
    assert merge("a", "a", "--guard", "text.txt", "--guard-limit", "1.001") == 0
    found = numbers("out.safetensors.report")
    assert found["guard_ratio"] == pytest.approx(1, rel=1e-5)
    assert found["guard_corpus"] == "text"
    for name, leaf in open_checkpoint("out.safetensors").items():
        np.testing.assert_allclose(leaf.read(), toy()[name], rtol=1e-6)


def test_a_merge_that_has_collapsed_is_told_and_not_written(toys, capsys):
    assert merge("a", "loud", "--no-align", "--guard", "text.txt") == 3
    printed = capsys.readouterr()
    assert printed.err.startswith("permjax: The guard refuses the result: the perplexity of text is")
    assert printed.err.count("\n") == 1
    assert "nothing was written" in printed.out
    assert not list(toys.glob("out*"))
    assert merge("a", "loud", "--no-align", "--guard", "text.txt", "--guard-limit", "1e38") == 0


def test_the_guard_looks_at_what_is_written_and_so_at_its_rounding(toys, capsys):
    free = ("--no-align", "--guard", "text.txt", "--guard-limit", "1e38")
    assert merge("half", "huge", *free) == 3
    assert "perplexity of text is nan" in capsys.readouterr().err


def test_a_network_fitted_by_pleas_is_guarded_too(toys):
    np.save("x.npy", np.random.default_rng(0).integers(0, 256, (20, 12)))
    how = ("--method", "pleas", "--budget", "1.5", "--calibration", "x.npy", "--guard", "text.txt", "--guard-limit")
    assert merge("a", "a", *how, "1.05") == 0
    assert numbers("out.safetensors.report")["guard_ratio"] == pytest.approx(1, rel=0.02)
    assert open_checkpoint("out.safetensors")["up"].shape[1] > 6, "a wider network is run by its own function"
    Path("out.safetensors").unlink()
    assert merge("a", "a", *how, "0.5") == 3
    assert not Path("out.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--guard-limit", "2"), "--guard-limit is for the guard; add --guard TEXT"),
        (("--tokenizer", "x.json"), "--tokenizer is for the guard"),
        (("--guard", "text.txt", "--guard-sentences", "0"), "must be above 0"),
        (("--guard", "none.txt"), "none.txt: this needs a text file"),
    ],
)
def test_options_of_the_guard_that_do_not_fit_are_refused(toys, capsys, arguments, says):
    assert merge("a", "a", *arguments) == 2
    assert says in capsys.readouterr().err


# adapters


def adapter(scale, seed):
    """Factors for one matrix of the MLP, which GPT-2 stores [in, out]."""
    rng = np.random.default_rng(seed)
    a, b = (scale * rng.standard_normal(shape).astype(np.float32) for shape in ((2, 12), (8, 2)))
    return {f"transformer.{MLP.removesuffix('.weight')}": Factors(a, b)}


@pytest.fixture
def adapters(folder):
    """Two small adapters for the model a.safetensors, and one that breaks it."""
    for seed, (name, scale) in enumerate({"one": 0.1, "two": 0.1, "wild": 6.0}.items()):
        save_adapter(name, adapter(scale, seed), like=())
    return folder


def merge_adapters(*arguments):
    return main(["lora", "merge", "--no-progress", "-o", "merged", "--method", "concat", *arguments])


def test_merged_adapters_are_measured_in_their_base_model_and_refused_if_they_break_it(adapters, capsys):
    guard = ("--guard", "text.txt", "--base", "a.safetensors")
    assert merge_adapters("one", "two", *guard) == 0

    def perplexity(*some):
        update = sum((one.b @ one.a).T for factors in some for one in factors.values())
        params = {**A, MLP: A[MLP] + update}
        return np.mean([np.exp(losses(params, line).mean()) for line in LINES])

    one, two = adapter(0.1, 0), adapter(0.1, 1)
    merged = perplexity(*({name: Factors(f.a, 0.5 * f.b) for name, f in some.items()} for some in (one, two)))
    best = min(perplexity({}), perplexity(one), perplexity(two))
    assert numbers("merged/report")["guard_ratio"] == pytest.approx(merged / best, rel=1e-4)
    capsys.readouterr()
    assert merge_adapters("one", "wild", *guard, "--guard-limit", "1.2", "--weights=1,1", "-o", "bad") == 3
    assert "The guard refuses the result" in capsys.readouterr().err
    assert not Path("bad").exists()


def test_the_names_of_kohyas_files_find_their_leaves(adapters, capsys):
    guard = ("--guard", "text.txt", "--base", "a.safetensors")
    for seed, name in enumerate(("one", "two")):
        save_adapter(f"{name}.safetensors", adapter(0.1, seed), like=(), style="kohya")
    assert merge_adapters("one", "two", *guard) == 0
    assert merge_adapters("one.safetensors", "two.safetensors", *guard, "-o", "kohya.safetensors") == 0
    ratios = [numbers(f"{out}report")["guard_ratio"] for out in ("merged/", "kohya.safetensors.")]
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-5)
    lost = {"transformer.h.9.mlp.c_proj": next(iter(adapter(0.1, 0).values()))}
    save_adapter("lost.safetensors", lost, like=(), style="kohya")
    capsys.readouterr()
    assert merge_adapters("lost.safetensors", *guard, "-o", "bad.safetensors") == 2
    assert "a.safetensors has no weight for the module 'lora_unet_h_9_mlp_c_proj'" in capsys.readouterr().err


def test_a_name_of_kohya_that_may_be_two_leaves_is_refused(tmp_path):
    save_checkpoint(
        tmp_path / "odd.safetensors", {f"{name}.weight": np.zeros((3, 2)) for name in ("a.b", "a_b", "c.d")}
    )
    checkpoint = open_checkpoint(tmp_path / "odd.safetensors")
    info = ModuleInfo("linear", 1, 1.0, (1, 2), (3, 1), np.dtype(np.float32))
    assert place_of("lora_te2_c_d", info, checkpoint) == ("c.d.weight", False)
    assert place_of("lora_unet_transformer_c_d", info, checkpoint) == ("c.d.weight", False)
    with pytest.raises(FilesError, match=r"may stand for any of \['a.b.weight', 'a_b.weight'\]"):
        place_of("lora_unet_a_b", info, checkpoint)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--guard", "text.txt"), "--guard TEXT and --base MODEL belong together"),
        (("--base", "a.safetensors"), "--guard TEXT and --base MODEL belong together"),
        (("--guard", "text.txt", "--base", "none"), "no checkpoint at none"),
    ],
)
def test_a_guard_of_adapters_needs_the_model_they_are_for(adapters, capsys, arguments, says):
    assert merge_adapters("one", "two", *arguments) == 2
    assert says in capsys.readouterr().err


def test_adapters_of_another_model_are_refused(adapters, capsys):
    save_adapter("lost", {"h.9.mlp.c_proj": Factors(np.ones((1, 12)), np.ones((8, 1)))}, like=())
    save_adapter("large", {"h.0.mlp.c_proj": Factors(np.ones((1, 13)), np.ones((8, 1)))}, like=())
    for name, says in {
        "lost": "no weight for the module 'h.9.mlp.c_proj'",
        "large": "updates a weight of 13 x 8",
    }.items():
        assert merge_adapters(name, "--guard", "text.txt", "--base", "a.safetensors") == 2
        assert says in capsys.readouterr().err
