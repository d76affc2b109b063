"""From the command line: facts of a model in files are changed under guard, written, or refused."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from permjax.cli import main
from permjax.edit.alphaedit import AlphaEdit
from permjax.edit.delta import apply_delta, load_delta
from permjax.edit.memit import Memit
from permjax.edit.rome import CRome, Rome
from permjax.experiments.architectures import find_architecture
from permjax.experiments.edit_editors import editors_of
from permjax.experiments.edit_options import EditOptions
from permjax.experiments.guard_files import read_probe
from permjax.experiments.language_files import open_language_model
from permjax.io.checkpoint import open_checkpoint, save_checkpoint
from permjax.io.tokenizers import FileTokenizer, train_byte_bpe
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig
from permjax.nets.registry import build, config_to_dict

pytest.importorskip("tokenizers", reason="tokenizers is not installed; it is in the extra `text`.")

LINES = [
    "Ann Bell lives in the city of Bonn.",
    "Carl Dorn lives in the city of Rome.",
    "The job of Ann Bell is to sing.",
    "It rains in Bonn, as it did.",
]
OTHERS = ["Eve Fox lives in the city of Rome.", "The job of Carl Dorn is to cook.", "They sing in the city."]
FACTS = [
    {
        "prompt": "{} lives in the city of",
        "subject": "Ann Bell",
        "target": "Rome",
        "paraphrases": ["The city of Ann Bell is"],
        "neighbours": ["Carl Dorn lives in the city of"],
    },
    {"prompt": "The job of {} is to", "subject": "Carl Dorn", "target": "sing"},
]
WEIGHT = "transformer.h.0.mlp.c_proj.weight"
QUICK = ("--no-progress", "--set", "value.steps=6")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random GPT-2 whose MLPs have a say, in bfloat16, with its tokenizer."""
    path = tmp_path_factory.mktemp("edit") / "model"
    tokenizer = train_byte_bpe(LINES * 8, 300)
    sizes = {"vocab_size": tokenizer.size, "n_positions": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24}
    config = GPT2Config(**sizes, prefix="transformer.")
    start = build(config).init(jax.random.key(0))
    params = {name: np.asarray(x * (20 if x.ndim > 1 else 1)).astype(ml_dtypes.bfloat16) for name, x in start.items()}
    save_checkpoint(path, params)
    values = {key: value for key, value in config_to_dict(config).items() if key != "prefix"}
    (path / "config.json").write_text(json.dumps(values))
    tokenizer.inner.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("edits.jsonl").write_text("\n".join(map(json.dumps, FACTS)))
    Path("guard.txt").write_text("\n".join(LINES))
    Path("text.txt").write_text("\n".join(OTHERS))
    return tmp_path


def edit(model, *arguments):
    return main(["edit", str(model), "--edits", "edits.jsonl", "-o", "out", *arguments])


def metrics():
    return json.loads(Path("out/report/metrics.json").read_text())


def test_a_model_is_written_with_the_edits_and_all_else_as_it_was(model, place, capsys):
    assert edit(model, *QUICK, "--guard", "guard.txt", "--guard-each", "1e9", "--guard-limit", "1e9") == 0
    before, after = open_checkpoint(model), open_checkpoint("out")
    assert [*before] == [*after]
    changed = [name for name in before if not np.array_equal(before[name].read(), after[name].read())]
    assert changed == [WEIGHT]
    assert {leaf.dtype for leaf in after.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert Path("out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    delta, opened = load_delta("out/delta.safetensors"), open_language_model(model)
    again = np.asarray(apply_delta(opened.params, delta)[WEIGHT])
    np.testing.assert_allclose(open_language_model("out").params[WEIGHT], again, rtol=0.02, atol=0.02)
    found = metrics()
    assert (found["edits"], found["accepted"], found["refused"]) == (2, 2, 0)
    assert found["target_loss"] < found["target_loss_before"] - 0.1
    assert found["efficacy_free"] <= found["efficacy_bare"]
    assert {"efficacy_prefixed", "paraphrase", "locality", "ppl_ratio_worst"} <= found.keys()
    assert "tokens that the model wrote itself" in capsys.readouterr().out


def test_what_every_editor_breaks_is_refused_with_status_3_and_nothing_is_written(model, place, capsys):
    assert edit(model, *QUICK, "--guard", "guard.txt", "--guard-each", "0.5", "--text", "text.txt") == 3
    printed = capsys.readouterr()
    assert "refuses all 2 edits, the last one because the perplexity of guard is" in printed.err
    assert printed.err.count("\n") == 1
    tried = [line.split() for line in printed.out.splitlines() if "above 0.5" in line]
    assert [row[:2] for row in tried] == [[str(n), name] for n in (1, 2) for name in ("ROME", "C-ROME", "MEMIT")]
    assert not Path("out").exists()


def test_an_energy_that_is_too_large_is_refused_before_any_text_is_read(model, place, capsys):
    energy = ("--guard", "guard.txt", "--guard-energy", "1e-6", "--no-fallback", "--identity")
    assert edit(model, *QUICK, *energy) == 3
    printed = capsys.readouterr()
    assert f"the energy of the change of {WEIGHT} is" in printed.err
    assert "second moments: the identity." in printed.out
    assert "C-ROME" not in printed.out


@pytest.mark.parametrize("method", ["alphaedit", "ft_l"])
def test_the_other_editors_write_too(model, place, method):
    assert edit(model, "--no-progress", "--method", method, "--batch", "2", "--text", "text.txt") == 0
    assert metrics()["accepted"] == 2
    assert "ppl_ratio_worst" not in metrics()
    changed = np.asarray(open_checkpoint("out")[WEIGHT].read() != open_checkpoint(model)[WEIGHT].read())
    assert changed.any()


def test_records_that_are_no_edits_are_refused_or_left_out_and_told(model, place, capsys):
    empty = {**FACTS[0], "target": ""}
    lines = [json.dumps(one) for one in (FACTS[0], empty, FACTS[1])] + ["no record"]
    Path("edits.jsonl").write_text("\n".join(lines))
    assert edit(model, *QUICK, "--identity") == 2
    assert "edits.jsonl, line 2: The target of the prompt" in capsys.readouterr().err
    assert edit(model, *QUICK, "--identity", "--skip-bad") == 0
    assert "2 records of edits.jsonl are no edits and were left out: line 2, line 4." in capsys.readouterr().out
    assert (metrics()["edits"], metrics()["skipped"]) == (2, 2)
    assert "line 4 is no JSON" in Path("out/report/report.html").read_text()
    Path("edits.jsonl").write_text(lines[1])
    assert edit(model, "--skip-bad", "-o", "other") == 2
    assert "edits.jsonl holds no edit; none of its 1 records is one. edits.jsonl, line 1" in capsys.readouterr().err


def write(name, text):
    return lambda _: Path(name).write_text(text)


def record(**changes):
    return write("edits.jsonl", json.dumps({**FACTS[0], **changes}))


@pytest.mark.parametrize(
    ("prepare", "arguments", "says"),
    [
        (record(prompt="He lives in"), (), "line 1: The subject 'Ann Bell' does not occur in the prompt"),
        (record(prompt="Ann Bell and Ann Bell"), (), "The subject 'Ann Bell' occurs 2 times"),
        (record(target=" "), (), "The target of the prompt"),
        (write("edits.jsonl", json.dumps(FACTS[0]) + "\nno record"), (), "edits.jsonl, line 2 is no JSON"),
        (record(prompt="{} " + "long " * 99), (), "rows of 96 were asked for"),
        (None, ("--edits", "none.jsonl"), "none.jsonl"),
        (None, ("--layer", "2"), "Layer 2 is to be edited, but the model has 2 layers"),
        (None, ("--set", "clamp=2"), "unknown key 'clamp'"),
        (None, ("--set", "values.clamp=2"), "rome has no settings under 'values'"),
        (None, ("--set", "key=odd"), "'key' must be"),
        (None, ("--guard-limit", "2"), "--guard-limit is for the guard; add --guard TEXT"),
        (None, ("--guard", "guard.txt", "--guard-each", "0"), "--guard-each must be above 0"),
        (None, ("--guard", "guard.txt", "--text", "guard.txt"), "--guard and --text share 4 sentences"),
        (None, ("--identity", "--text", "text.txt"), "give only one"),
        (None, ("--batch", "0"), "--batch must be at least 1"),
        (None, ("-o", "out.safetensors"), "needs a folder"),
        (None, ("--method", "alphaedit", "--identity"), "no covariances are given"),
        (write("text.txt", "It is."), ("--text", "text.txt", "--ridge", "0"), "is singular; collect it from more text"),
    ],
)
def test_what_cannot_be_edited_is_told_in_a_line(model, place, capsys, prepare, arguments, says):
    if prepare:
        prepare(None)
    assert edit(model, "--no-progress", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


def test_a_tokenizer_of_another_model_and_a_model_in_the_way_are_refused(model, place, capsys):
    before = (model / "model.safetensors").read_bytes()
    assert edit(model, "-o", str(model)) == 2
    assert "would be written over the model" in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == before
    other = Path("other")
    other.mkdir()
    for name in ("config.json", "model.safetensors"):
        (other / name).write_bytes((model / name).read_bytes())
    train_byte_bpe([f"{line} {n}" for n in range(300) for line in LINES], 420).inner.save(str(other / "tokenizer.json"))
    assert edit(other) == 2
    assert "tokens, but the model knows" in capsys.readouterr().err


def options(**given):
    return EditOptions("model", "edits.jsonl", "out", guard=("guard.txt",), **given)


def test_perplexity_is_taken_without_what_a_tokenizer_puts_before_a_text(model, place, capsys):
    bare = read_probe(["guard.txt"], *opened(model), None, 8)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    sequence = [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {"!": {"id": "!", "ids": [0], "tokens": ["!"]}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [],
        "special_tokens": tokens,
    }
    other = Path("other")
    shutil.copytree(model, other)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert FileTokenizer(open_language_model(other).tokenizer.inner).encode("Ann").ids[0] == 0
    jax.tree.map(np.testing.assert_array_equal, bare, read_probe(["guard.txt"], *opened(other), None, 8))
    with_it = read_probe(["guard.txt"], *opened(other), None, 8, special=True)
    assert all((batch.tokens[batch.mask.any(-1), 0] == 0).all() for batch in with_it["guard"])


def opened(folder):
    """The architecture and the files of a model."""
    checkpoint = open_checkpoint(folder)
    return find_architecture((checkpoint,), None, None), checkpoint


def test_a_model_of_a_paper_gets_its_settings_and_others_relative_ones():
    large = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    found = editors_of(options(), large)
    assert [*found] == ["rome", "c_rome", "memit"]
    assert found["rome"] == Rome(17, ridge=1e-3)
    assert found["memit"] == Memit((13, 14, 15, 16, 17), ridge=1e-3)
    small = editors_of(options(ridge=0.0), GPT2Config(n_layer=6))
    assert small["rome"].layer == 2
    assert small["rome"].value.relative
    llama = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    assert editors_of(options(method="alphaedit"), llama) == {
        "alphaedit": AlphaEdit((4, 5, 6, 7, 8), value=editors_of(options(method="memit"), llama)["memit"].value)
    }


def test_the_layer_is_for_all_editors_and_settings_for_the_first():
    found = editors_of(options(layer=1, settings=("value.clamp=2", "key=bare")), GPT2Config(n_layer=6))
    assert (found["rome"].layer, found["c_rome"].layer, found["memit"].layers) == (1, 1, (0, 1))
    assert (found["rome"].value.clamp, found["rome"].key) == (2.0, "bare")
    assert found["c_rome"] == CRome(1, ridge=1e-3, value=found["c_rome"].value)
    assert found["c_rome"].value.clamp == 4
    assert [*editors_of(options(method="c_rome"), GPT2Config())] == ["c_rome", "memit"]
    assert [*editors_of(options(fallback=False), GPT2Config())] == ["rome"]
