"""Knowledge graphs from the command line: one command to train, and others to use what was trained."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from permjax.cli import main
from permjax.experiments.kge_rules_report import recovered
from permjax.kge.family import family_graph
from permjax.kge.graph import save_graph
from permjax.kge.model_files import KgeModel, family_named, load_kge, save_kge
from permjax.kge.rank import rank_metrics, rank_model
from permjax.kge.rules import RuleReport

TINY = (
    "--set",
    "dimension=8",
    "--set",
    "training.epochs=2",
    "--set",
    "seeds=1",
    "--set",
    "training.learning_rate=0.05",
)
TRAIN = "ann\tknows\tbob\nbob\tknows\tcid\ncid\tlikes\tann\nann\tlikes\tcid\ndan\tknows\tann\n"


def run(*arguments):
    return main(["kge", *arguments])


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"train": TRAIN, "valid": "bob\tlikes\tdan\n", "test": "dan\tlikes\tbob\n"}
    for name, text in (usual | texts).items():
        (folder / f"{name}.txt").write_text(text)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a saved model of a small family tree, `model`, that was not trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PERMJAX_DATA", raising=False)
    graph = family_graph(couples=4, generations=3)
    family = family_named("nfe_1", {"dimension": 4})
    params = family.init(jax.random.key(0), graph.size, 2 * len(graph.relations), 0.3)
    save_kge("model", KgeModel(family, params, graph, 4.0))
    return graph


def refusal(capsys):
    """The one line that a command said on the error stream."""
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


# from triples to answers


def test_a_folder_of_triples_becomes_a_model_that_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine")
    assert run("train", "--graph", "mine", "--out", "out", "--no-progress", *TINY) == 0
    found = json.loads(Path("out/metrics.json").read_text())
    model = load_kge("out/model")
    assert rank_metrics(rank_model(model.family, model.params, model.graph))["mrr"] == pytest.approx(found["mrr"])
    assert run("predict", "out", "--head", "ann", "--relation", "knows", "--top", "4") == 0
    printed = capsys.readouterr().out
    assert "(ann, knows, ?)" in printed
    assert "bob" in printed
    assert run("train", "--graph", "mine", "--out", "out", "--no-progress", *TINY) == 0
    assert "--force" in capsys.readouterr().out


def test_evaluation_tells_every_treatment_of_ties_and_ranks_other_triples(here, capsys):
    graph = here
    assert run("eval", "model", "-o", "report", "--split", "valid") == 0
    found = json.loads(Path("report/metrics.json").read_text())
    model = load_kge("model")
    wanted = rank_model(model.family, model.params, graph, "valid")
    for policy in ("optimistic", "realistic", "pessimistic", "libkge"):
        assert found[f"mrr_{policy}"] == pytest.approx(rank_metrics(wanted, policy)["mrr"])
    save_graph(graph, "copy.npz")
    capsys.readouterr()
    assert run("eval", "model", "--graph", "copy.npz") == 0
    own = rank_metrics(rank_model(model.family, model.params, graph))
    assert f"MRR {own['mrr']:.3f}, Hits@1 {own['hits_at_1']:.3f}" in capsys.readouterr().out


def test_answers_come_with_scores_marks_and_spreads(here, capsys):
    head, relation, tail = here.test[0]
    names = here.entities[head], here.relations[relation], here.entities[tail]
    assert run("predict", "model", "--head", names[0], "--relation", names[1], "--top", str(here.size)) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.split(maxsplit=1)[1:] and f" {names[2]} " in line)
    assert " test " in row
    assert "spread" in printed
    assert run("predict", "model", "--tail", names[2], "--relation", names[1], "--top", "2", "-o", "out") == 0
    assert json.loads(Path("out/metrics.json").read_text())["spread"] > 0


def test_a_model_is_exported(here, capsys):
    for ending in ("npz", "tsv"):
        assert run("export", "model", "-o", f"out.{ending}") == 0
        assert Path(f"out.{ending}").stat().st_size > 0
    assert tuple(np.load("out.npz")["entities"]) == here.entities
    assert "was written to out.npz" in capsys.readouterr().out


def test_rules_are_listed_with_how_many_known_ones_are_found(here, capsys):
    assert run("rules", "model", "--kind", "symmetry", "--kind", "inverse", "--top", "2", "-o", "out") == 0
    found = json.loads(Path("out/metrics.json").read_text())
    assert found["rules_found"] <= found["rules_measured"]
    assert "rules_recall" in found
    assert "is married_to(y, x)" not in capsys.readouterr().out  # the tables are in the report
    assert run("rules", "model", "--kind", "symmetry") == 0
    printed = capsys.readouterr().out
    assert "married_to(x, y) implies married_to(y, x)" in printed
    assert "composition" not in printed  # kinds that were not asked for have no precision


@pytest.mark.fast
def test_nothing_found_has_no_precision(here):
    report = RuleReport((), (), np.zeros((0, 0), np.float32), {}, 0.0)
    assert recovered(report, here.rules)["rules_recall"] == 0
    assert np.isnan(recovered(report, here.rules)["rules_precision"])


# what is wrong


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("predict", "model", "--head", "nobody", "--relation", "parent_of"), "no entity 'nobody' (nearest: "),
        (
            ("predict", "model", "--head", "nobody", "--relation", "parentof"),
            "no relation 'parentof' (nearest: 'parent_of",
        ),
        (("predict", "model", "--relation", "parent_of"), "a head or a tail"),
        (("predict", "nowhere", "--head", "a", "--relation", "b"), "no checkpoint at nowhere"),
        (("export", "model", "-o", "model.csv"), "model.csv has no ending that is known"),
        (("eval", "model", "--graph", "nowhere"), "There is no nowhere"),
        (("eval", "model", "--graph", "umls"), "umls"),
        (("rules", "model", "--kind", "symetry"), "no kind of rule 'symetry' (nearest: 'symmetry')"),
        (("train", "--graph", "umls"), "umls"),
        (("train", "nfe_famly"), "no configuration 'nfe_famly' (nearest: 'nfe_family')"),
        (("train", "--set", "models=[{name='nfe_7'}]"), "no family 'nfe_7'"),
        (("train", "--set", "training.loss=bce"), "'training.loss' must be one of 'bce_all'"),
    ],
)
def test_bad_input_is_refused_in_one_line(here, capsys, arguments, words):
    assert run(*arguments) == 2
    assert words in refusal(capsys)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"train": f"{TRAIN}ann knows bob\n"}, "train.txt, line 6: 'ann knows bob' must be head, relation and tail"),
        ({"valid": ""}, "valid"),
        ({"test": "ann\thates\tbob\n"}, "'hates'"),
    ],
)
def test_bad_triples_are_refused_in_one_line(tmp_path, monkeypatch, capsys, texts, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine", **texts)
    assert run("train", "--graph", "mine", "--no-progress") == 2
    assert words in refusal(capsys)


@pytest.mark.fast
def test_an_id_out_of_range_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("ids").mkdir()
    for name, text in {"entity": "ann\t0\nbob\t1\n", "relation": "knows\t0\n"}.items():
        Path(f"ids/{name}2id.txt").write_text(text)
    for name, text in {"train": "0 0 1\n1 0 2\n", "valid": "0 0 1\n", "test": "1 0 0\n"}.items():
        Path(f"ids/{name}2id.txt").write_text(text)
    assert run("train", "--graph", "ids", "--no-progress") == 2
    assert "train2id.txt, line 2: the tail id 2 is out of range; ids are 0..1" in refusal(capsys)


def test_a_loss_that_is_no_number_ends_in_one_line_and_keeps_the_last_good_state(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine")
    setting = ("--set", "training.learning_rate=1e30", "--set", "training.decay=1")
    assert run("train", "--graph", "mine", "--out", "out", "--no-progress", *TINY[:-2], *setting) == 2
    said = refusal(capsys)
    assert "no finite number" in said
    assert "out/state" in said
    assert not Path("out/metrics.json").exists()
