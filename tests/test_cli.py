"""The command line: what it writes, when it starts anew, and how it fails."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import permjax.cli
from permjax.config import ConfigError
from permjax.data.dataset import MissingData
from permjax.experiments import runs
from permjax.experiments.registry import Experiment, experiments
from permjax.io.checkpoint import open_checkpoint, save_checkpoint
from permjax.report import Outcome, Table

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class FakeConfig:
    experiment: ClassVar[str] = "fake"
    steps: int = 3
    fails: str = ""
    seed: int = 0


ERRORS = {
    "value": ValueError("leaf 'a/kernel' has\n  two lines"),
    "config": ConfigError("the key 'x' is wrong"),
    "data": MissingData("cifar-10 is not in /data; set `data.root`"),
    "disk": PermissionError(13, "Permission denied", "/out"),
    "bug": ZeroDivisionError("division by zero"),
    "key": KeyError("lost"),
    "interrupt": KeyboardInterrupt(),
}


class Fake:
    """An experiment that counts its steps in `state` and can be made to fail after two of them."""

    def __init__(self):
        self.calls = 0
        self.taken = []

    def run(self, config, out, progress):
        self.calls += 1
        state = out / "state" / "steps.txt"
        state.parent.mkdir(parents=True, exist_ok=True)
        first = int(state.read_text()) if state.exists() else 0
        progress.start("counting", config.steps)
        for step in range(first, config.steps):
            if config.fails and step == 2 and first < 2:
                raise ERRORS[config.fails]
            self.taken.append(step)
            state.write_text(str(step + 1))
            progress.step(1, loss=0.5)
        progress.done()
        table = Table("Counted", ("what", "how many"), (("steps", config.steps),))
        return Outcome("Counting", "Counted.", {"steps": config.steps, "half": config.steps / 2}, (table,))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A registry with only the fake experiment, in a folder with its configuration."""
    experiment = Fake()
    monkeypatch.setattr(runs, "experiments", lambda: {"fake": Experiment(FakeConfig, experiment.run)})
    monkeypatch.chdir(tmp_path)
    Path("count.toml").write_text('experiment = "fake"\n')
    return experiment


def test_a_run_fills_its_folder_and_prints_the_numbers_and_the_place(fake, capsys):
    assert permjax.cli.main(["run", "count.toml", "--out", "out", "--set", "steps=4"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"config.toml", "metrics.json", "report.html"}
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert (metrics["steps"], metrics["half"]) == (4, 2.0)
    assert "permjax run count.toml --out out --set steps=4" in Path("out/report.html").read_text()
    printed = capsys.readouterr()
    assert "half" in printed.out
    assert str(Path("out/report.html")) in printed.out
    assert "counting: 100%" in printed.err


def test_the_folder_is_named_after_the_configuration_and_its_hash(fake):
    for arguments in ([], ["--set", "steps=4"]):
        assert permjax.cli.main(["run", "count.toml", "--no-progress", *arguments]) == 0
    folders = sorted(Path("runs").iterdir())
    hashes = [json.loads((folder / "metrics.json").read_text())["config_hash"] for folder in folders]
    assert [folder.name for folder in folders] == [f"count-{code}" for code in hashes]
    assert len(set(hashes)) == 2


def test_a_complete_run_is_shown_again_and_not_repeated(fake, capsys):
    assert permjax.cli.main(["run", "count.toml", "--out", "out"]) == 0
    before = Path("out/metrics.json").read_text()
    assert permjax.cli.main(["run", "count.toml", "--out", "out"]) == 0
    assert fake.calls == 1
    assert Path("out/metrics.json").read_text() == before
    printed = capsys.readouterr().out
    assert printed.count("half") == 2
    assert "--force" in printed


def test_force_starts_anew_and_keeps_what_is_not_of_the_run(fake):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert permjax.cli.main(["run", "count.toml", "--out", "out"]) == 0
    assert permjax.cli.main(["run", "count.toml", "--out", "out", "--set", "steps=2", "--force"]) == 0
    assert fake.taken == [0, 1, 2, 0, 1]
    assert json.loads(Path("out/metrics.json").read_text())["steps"] == 2
    assert Path("out/notes.txt").read_text() == "mine"


def test_an_interrupted_run_goes_on_where_it_was(fake, capsys):
    arguments = ["run", "count.toml", "--out", "out", "--no-progress", "--set", "fails=interrupt"]
    assert permjax.cli.main(arguments) == 130
    assert not Path("out/metrics.json").exists()
    assert capsys.readouterr().err.count("\n") == 1
    assert permjax.cli.main(arguments) == 0
    assert fake.taken == [0, 1, 2]
    assert not Path("out/state").exists()


def test_a_folder_with_another_run_is_refused_with_the_first_difference(fake, capsys):
    assert permjax.cli.main(["run", "count.toml", "--out", "out"]) == 0
    assert permjax.cli.main(["run", "count.toml", "--out", "out", "--set", "steps=9"]) == 2
    assert "'steps' is 3 there, but 9 here" in capsys.readouterr().err
    assert permjax.cli.main(["run", "count.toml", "--out", "new", "--set", "fails=value"]) == 2
    assert permjax.cli.main(["run", "count.toml", "--out", "new"]) == 2
    assert "'fails' is 'value' there, but '' here" in capsys.readouterr().err


def test_a_folder_in_which_nothing_was_done_yet_is_free(fake):
    Path("out").mkdir()
    Path("out/config.toml").write_text('experiment = "fake"\nsteps = 9\n')
    assert permjax.cli.main(["run", "count.toml", "--out", "out"]) == 0


def test_foreign_results_are_never_overwritten(fake, capsys):
    Path("out").mkdir()
    Path("out/metrics.json").write_text("{}")
    for arguments in ([], ["--force"]):
        assert permjax.cli.main(["run", "count.toml", "--out", "out", *arguments]) == 2
    assert Path("out/metrics.json").read_text() == "{}"
    assert "no config.toml" in capsys.readouterr().err


def test_no_progress_means_none(fake, capsys):
    assert permjax.cli.main(["run", "count.toml", "--no-progress"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("fails", "status", "words"),
    [
        ("value", 2, "leaf 'a/kernel' has two lines"),
        ("config", 2, "the key 'x' is wrong"),
        ("data", 2, "cifar-10 is not in /data; set `data.root`"),
        ("disk", 2, "Permission denied"),
        ("bug", 1, "internal error, ZeroDivisionError: division by zero"),
        ("key", 1, "internal error, KeyError"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_every_failure_is_one_line_and_a_status(fake, capsys, fails, status, words):
    arguments = ["run", "count.toml", "--no-progress", "--set", f"fails={fails}"]
    assert permjax.cli.main(arguments) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("permjax: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err


def test_the_traceback_of_a_bug_is_kept_in_a_file(fake, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert permjax.cli.main(["run", "count.toml", "--set", "fails=bug"]) == 1
    (file,) = tmp_path.glob("permjax-*.txt")
    assert str(file) in capsys.readouterr().err
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "cuont.toml"], "no configuration 'cuont.toml'"),
        (["run", "rebasin_digit"], "nearest: 'rebasin_digits'"),
        (["run", "broken.toml"], "broken.toml has the unknown key 'stesp' (nearest: 'steps')"),
        (["run", "count.toml", "--set", "stpes=1"], "--set stpes=1 has the unknown key"),
        (["run", "count.toml", "--out", "count.toml"], "count.toml"),
        (["run", "count.toml", "--nonsense"], "--nonsense"),
        (["fly"], "fly"),
        ([], "run"),
        (["align", "a.safetensors", "b.safetensors", "-o", "c.safetensors"], "a.safetensors"),
        (["merge", "a.safetensors", "b.safetensors", "-o", "c", "--weights", "1,x"], "--weights"),
    ],
)
def test_a_wrong_command_exits_with_two_and_names_what_is_wrong(fake, capsys, arguments, words):
    Path("broken.toml").write_text('experiment = "fake"\nstesp = 3\n')
    assert permjax.cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err


def test_every_configuration_that_comes_with_permjax_is_read(monkeypatch):
    kinds = {kind: experiment.config for kind, experiment in experiments().items()}
    shipped = runs._shipped()
    assert runs.DEMO in shipped
    for name, path in shipped.items():
        config = runs.load_config(runs.find_config(name), [], kinds)
        assert config.experiment in kinds, path


def test_every_experiment_names_its_own_kind():
    for kind, experiment in experiments().items():
        assert experiment.config.experiment == kind


def numbers(seed):
    """Weights of an MLP 3-4-2 under the names of linen."""
    rng = np.random.default_rng(seed)
    shapes = {"Dense_0/kernel": (3, 4), "Dense_0/bias": (4,), "Dense_1/kernel": (4, 2), "Dense_1/bias": (2,)}
    return {f"params/{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two MLPs in files, the second one a permuted copy of the first with a little noise, and their configuration."""
    monkeypatch.chdir(tmp_path)
    a, order = numbers(0), [2, 0, 3, 1]
    b = {name: values + 0.01 * numbers(1)[name] for name, values in a.items()}
    b["params/Dense_0/kernel"] = b["params/Dense_0/kernel"][:, order]
    b["params/Dense_0/bias"] = b["params/Dense_0/bias"][order]
    b["params/Dense_1/kernel"] = b["params/Dense_1/kernel"][order]
    for name, tensors in {"a": a, "b": b}.items():
        save_checkpoint(f"{name}.safetensors", tensors)
    values = {"model_type": "mlp", "input_shape": [3], "hidden": [4], "classes": 2}
    Path("config.json").write_text(json.dumps(values))
    return a


def test_align_writes_the_model_and_a_report_beside_it(models, capsys):
    assert permjax.cli.main(["align", "a.safetensors", "b.safetensors", "-o", "c.safetensors"]) == 0
    aligned = open_checkpoint("c.safetensors").load()
    assert max(np.abs(aligned[name] - values).max() for name, values in models.items()) < 0.1
    report = Path("c.safetensors.report")
    assert json.loads((report / "metrics.json").read_text())["l2_reduction_percent"] > 90
    assert "permjax align a.safetensors b.safetensors -o c.safetensors" in (report / "report.html").read_text()
    printed = capsys.readouterr()
    assert str(report / "report.html") in printed.out
    assert "matching" in printed.err


def test_merge_takes_weights_separated_by_commas_and_reports_inside_a_folder(models):
    arguments = ["a.safetensors", "b.safetensors", "-o", "merged", "--weights", "1,0", "--no-progress"]
    assert permjax.cli.main(["merge", *arguments]) == 0
    merged = open_checkpoint("merged").load()
    for name, values in models.items():
        np.testing.assert_allclose(merged[name], values, rtol=1e-6)
    assert "weights = [" in Path("merged/report/config.toml").read_text()


def test_help_imports_no_experiment_and_the_module_is_the_command():
    code = (
        "import sys, permjax; known = set(sys.modules); from permjax.cli import main; main(['--help']); "
        "more = {name.split('.')[0] for name in set(sys.modules) - known}; "
        "assert not more & {'jax', 'flax', 'optax', 'orbax', 'matplotlib', 'jinja2', 'rich'}, more; "
        "assert 'permjax.experiments' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(permjax.cli.__file__).parents[1])}
    for command in (["-c", code], ["-m", "permjax", "--help"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "align" in done.stdout
