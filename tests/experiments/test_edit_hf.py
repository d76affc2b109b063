"""Edits of a checkpoint: tiny random models of both layouts, edited one by one and in a row."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from permjax.cli import main
from permjax.edit.collapse import Efficacy
from permjax.edit.delta import apply_delta
from permjax.edit.evaluate import evaluate
from permjax.edit.rome import Rome
from permjax.edit.templates import NAMES, TEMPLATES, template_cases
from permjax.experiments import edit_hf
from permjax.experiments.edit_hf_config import EditHfConfig
from permjax.experiments.edit_hf_files import opened
from permjax.experiments.edit_hf_report import Arm, Found, Stream, report
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments
from permjax.io.checkpoint import save_checkpoint
from permjax.io.tokenizers import train_byte_bpe
from permjax.merge.perplexity import group_losses, perplexity_of
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig
from permjax.nets.registry import build, config_to_dict

pytest.importorskip("tokenizers", reason="tokenizers is not installed; it is in the extra `text`.")

LINES = [f"{name} lives in the city of {place}." for name, place in zip(NAMES, 6 * TEMPLATES[0].targets, strict=False)]
LINES += [one.first.format(name) for one in TEMPLATES for name in NAMES[:6]]
CONFIGS = {
    "gpt2": lambda size: GPT2Config(size, n_positions=96, n_embd=16, n_layer=2, n_head=2, n_inner=24),
    "llama": lambda size: LlamaConfig(size, 16, 24, 2, 2, 1, max_position_embeddings=96),
}
QUICK = {"steps": 2, "prefixes": 1, "most": 3, "sentences": 4, "guard_sentences": 4, "sequence": 2, "every": 1}


def made(path, layout):
    """A random model whose MLPs have a say, with its tokenizer; Llama's puts a token before every text."""
    tokenizer = train_byte_bpe(LINES * 8, 380)
    net = build(CONFIGS[layout](tokenizer.size))
    params = {name: np.asarray(x * (20 if x.ndim > 1 else 1)) for name, x in net.init(jax.random.key(0)).items()}
    save_checkpoint(path, params)
    values = {key: value for key, value in config_to_dict(net.config).items() if key != "prefix"}
    (path / "config.json").write_text(json.dumps(values))
    spelled = json.loads(tokenizer.inner.to_str())
    if layout == "llama":
        single = [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"!": {"id": "!", "ids": [0], "tokens": ["!"]}}
        spelled["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [],
            "special_tokens": special,
        }
    (path / "tokenizer.json").write_text(json.dumps(spelled))
    return str(path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {layout: made(tmp_path_factory.mktemp(layout) / "model", layout) for layout in CONFIGS}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(config, folder):
    with Progress(visible=False) as progress:
        return edit_hf.run(config, folder, progress)


@pytest.mark.parametrize(("layout", "editors"), [("gpt2", ("rome", "c_rome", "memit")), ("llama", ("rome", "ft_l"))])
def test_a_checkpoint_is_edited_one_by_one_and_in_a_row(models, tmp_path, layout, editors):
    config = EditHfConfig(models[layout], editors=editors, **QUICK)
    outcome = run(config, tmp_path)
    for name in config.editors:
        for kind in ("", "_control"):
            shares = [outcome.metrics[f"{name}{kind}_{key}"] for key in ("share_above_2x", "share_above_1000")]
            shares += [outcome.metrics[f"{name}{kind}_efficacy_{key}"] for key in Efficacy._fields]
            assert all(0 <= share <= 1 for share in shares)
        assert {f"{name}_ppl_at_1", f"{name}_ppl_at_2"} <= outcome.metrics.keys()
    found = outcome.metrics
    assert found["edits_hard"] == found["edits_control"] == 3
    assert found["rome_denominator_median"] > 0
    assert abs(found["rome_keys_cosine_median"]) <= 1
    assert not {"memit_denominator_median", "ft_l_denominator_median"} & found.keys()
    assert 0 <= found["guarded_accepted_share"] <= 1
    if found["guarded_accepted_share"] == 0:
        assert found["guarded_ppl_ratio"] == 1
    assert "tokens that the model wrote itself" in outcome.summary
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"hard", "control"}


def test_edits_side_by_side_are_those_of_edited_copies(models, tmp_path):
    config = EditHfConfig(models["gpt2"], editors=("rome",), chunk=2, **{**QUICK, "sequence": 0})
    run(config, tmp_path)
    job = opened(config)
    assert job.guard == {}
    cases, files = job.cases["hard"], job.files
    with np.load(tmp_path / "state" / "hard" / "rome.npz") as arm:
        for row in range(3):
            edit = [cases.written["rome"][row]]
            result = job.editors["rome"](files.net, files.params, edit, covariances=job.statistics)
            edited = apply_delta(files.params, result.delta)
            (losses,) = group_losses(files.net.apply, edited, job.probe).values()
            scores = evaluate(files.net, edited, [cases.asked[row]])
            np.testing.assert_allclose(arm["perplexity"][row], perplexity_of(losses), rtol=2e-3)
            np.testing.assert_allclose(arm["denominator"][row], abs(result.info.denominator[0]), rtol=1e-4)
            np.testing.assert_allclose([arm["bare"][row], arm["free"][row]], [scores.bare[0], scores.free[0]])


def test_what_is_kept_of_an_interrupted_run_is_not_computed_again(models, tmp_path):
    config = EditHfConfig(models["gpt2"], editors=("rome",), **{**QUICK, "sequence": 0})
    run(config, tmp_path)
    path = tmp_path / "state" / "hard" / "rome.npz"
    with np.load(path) as kept:
        changed = {**kept, "perplexity": np.full(3, np.nan)}
    np.savez(path, **changed)
    outcome = run(config, tmp_path)
    assert outcome.metrics["rome_share_above_2x"] == outcome.metrics["rome_share_above_1000"] == 1
    assert outcome.metrics["rome_control_share_above_1000"] < 1


def write(name, *records):
    Path(name).write_text("\n".join(map(json.dumps, records)))


def fact(request):
    return {"prompt": request.prompt, "subject": request.subject, "target": request.target}


def test_hard_cases_are_mined_from_a_file_and_texts_are_read(models, place):
    hard, controls = template_cases(opened(EditHfConfig(models["gpt2"], **QUICK)).files.tokenizer, 4)
    write("edits.jsonl", *map(fact, (*hard, *controls)), {"prompt": "{} is", "subject": "Ann", "target": ""})
    for name, lines in {"probe": LINES[:5], "text": LINES[5:30], "guard": LINES[30:36]}.items():
        Path(f"{name}.txt").write_text("\n".join(lines))
    arguments = ["run", "edit_hf", "--no-progress", "--out", "out", "--set", f"checkpoint={models['gpt2']}"]
    for key, value in {**QUICK, "edits": "edits.jsonl", "editors": '["rome"]', "skip_bad": "true"}.items():
        arguments += ["--set", f"{key}={value}"]
    for name in ("probe", "text", "guard"):
        arguments += ["--set", f'{name}=["{name}.txt"]']
    assert main(arguments) == 0
    found = json.loads(Path("out/metrics.json").read_text())
    assert (found["edits_hard"], found["edits_control"], found["skipped"]) == (3, 3, 1)
    page = Path("out/report.html").read_text()
    assert "tokens of text.txt" in page
    assert "line 9: The target of" in page
    assert main([*arguments[:4], "given", *arguments[5:], "--set", "mine=false", "--set", "sequence=0"]) == 0
    assert json.loads(Path("given/metrics.json").read_text())["edits_given"] == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"checkpoint": "none"}, "no checkpoint at none"),
        ({"edits": "edits.jsonl"}, "edits.jsonl, line 2: The target of"),
        ({"edits": "edits.jsonl", "skip_bad": "true"}, "give some of both"),
        ({"probe": '["a.txt"]', "guard": '["a.txt"]'}, "probe and guard share 3 sentences"),
        ({"layer": 7}, "Layer 7 is to be edited, but the model has 2 layers"),
        ({"editors": '["rom"]'}, "there is no editor 'rom'"),
        ({"sequence": -1}, "sequence must be 0 or more"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"identity": "true", "text": '["a.txt"]'}, "leave one of them out"),
    ],
)
def test_what_cannot_be_run_is_told_in_a_line(models, place, capsys, options, says):
    write(
        "edits.jsonl",
        fact(template_cases(train_byte_bpe(LINES * 8, 380), 1).hard[0]),
        {"prompt": "{} is", "subject": "Ann", "target": ""},
    )
    Path("a.txt").write_text("\n".join(LINES[:3]))
    arguments = ["run", "edit_hf", "--no-progress", "--out", "out"]
    for key, value in {"checkpoint": models["gpt2"], **QUICK, **options}.items():
        arguments += ["--set", f"{key}={value}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("out/metrics.json").exists()


def test_a_search_is_shortened_and_other_settings_stay(models):
    job = opened(EditHfConfig(models["gpt2"], editors=("rome", "ft_l"), layer=1, **QUICK))
    rome = job.editors["rome"]
    assert isinstance(rome, Rome)
    assert (rome.layer, rome.ridge, rome.value.steps, rome.value.clamp) == (1, 1e-3, 2, 4)
    assert (job.editors["ft_l"].steps, job.editors["ft_l"].layer) == (2, 1)
    assert len(job.cases["hard"].written["rome"][0].tokens) == 3  # the bare prompt, and a prefix of each length
    assert len(job.cases["hard"].written["ft_l"][0].tokens) == 1


def arm(ratios, denominators):
    count = len(ratios)
    perplexity = 10 * np.asarray(ratios, np.float64)
    ones = np.ones(count)
    return Arm(perplexity, ones, ones, ones, ones, np.asarray(denominators, np.float64), ones, ones)


def test_a_report_tells_what_broke_and_counts_what_is_not_a_number_as_broken():
    config = EditHfConfig(editors=("rome", "c_rome"))
    arms = {
        "hard": {"rome": arm([1.0, 3.0, 200.0, np.nan], [9, 2, 1, 0.1]), "c_rome": arm([1.0] * 4, [9] * 4)},
        "control": {"rome": arm([1.0, 1.1], [9, 8]), "c_rome": arm([1.0] * 2, [9] * 2)},
    }
    efficacy = dict.fromkeys(Efficacy._fields, 0.5)
    stream = Stream({5: 20.0, 10: np.inf}, efficacy, ("rome",) * 10)
    guarded = Stream({5: 10.0, 10: 11.0}, efficacy, ("rome", None) * 5)
    found = Found("a text", {"hard": 4, "control": 2}, (), 10.0, arms, {"rome": stream, "c_rome": stream}, guarded)
    outcome = report(config, found)
    metrics = outcome.metrics
    assert (metrics["rome_share_above_2x"], metrics["rome_share_above_1000"]) == (0.75, 0.5)
    assert (metrics["rome_control_share_above_2x"], metrics["c_rome_share_above_2x"]) == (0, 0)
    assert metrics["rome_ratio_max"] == np.inf
    assert metrics["rome_spearman_denominator_ppl"] == pytest.approx(-1)
    assert (metrics["unguarded_ppl_ratio"], metrics["guarded_ppl_ratio"]) == (np.inf, pytest.approx(1.1))
    assert metrics["guarded_accepted_share"] == 0.5
    assert "ROME: above twice the perplexity 3 of 4 hard edits (worst inf times), 0 of 2 controls" in outcome.summary
    assert "1.1 times under a guard that accepted 50 % of them (5 by ROME)" in outcome.summary


def test_the_shipped_configuration_is_one_of_this_kind():
    assert experiments()["edit_hf"].config is EditHfConfig
