"""The report: a folder that is complete or not, and a page that needs nothing but itself."""

import base64
import io
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import permjax.report
from permjax.config import config_hash, load_config
from permjax.io.checkpoint import open_checkpoint
from permjax.report import (
    PROVENANCE,
    Contour,
    Curve,
    Figure,
    Matrix,
    Outcome,
    Table,
    Text,
    format_value,
    headline,
    write_report,
)

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Config:
    experiment: ClassVar[str] = "study"
    seed: int = 4
    width: int = 8


FIGURE = Figure("loss", "Loss", "Along <the> line.", "position", "loss", (Curve("naive", [0, 1], [1.0, 2.0]),))
OUTCOME = Outcome(
    title="A study of <b>units</b>",
    summary="Two networks & one plan.",
    metrics={"accuracy": np.float32(0.5), "steps": 12, "exact": True, "method": "weights", "loss": jnp.array(2.0)},
    tables=(
        Table("Barriers", ("method", "barrier", "found"), (("naive", 0.5, "a"), ("matched", 0.012, "b")), "In nats."),
    ),
    figures=(FIGURE,),
    texts=(Text("Spec", "1 group\n  over <2> leaves"),),
    models={"a": {"dense/kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}},
    headline=("accuracy",),
)


class Page(HTMLParser):
    """The tags with their attributes, and the text, of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "study"
    write_report(OUTCOME, out, Config(), command="permjax run study.toml --set 'title=a b'", seconds=1.23456)
    return out


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_folder_holds_what_it_should_and_nothing_temporary(folder):
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert found == ["config.toml", "figures/loss.png", "metrics.json", "model/a.safetensors", "report.html"]


def test_the_metrics_are_one_flat_object_with_their_provenance(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {key: metrics[key] for key in OUTCOME.metrics} == {
        "accuracy": 0.5, "steps": 12, "exact": True, "method": "weights", "loss": 2.0
    }  # fmt: skip
    assert metrics["config_hash"] == config_hash(Config())
    assert metrics["seed"] == 4
    assert metrics["seconds"] == 1.235
    assert re.search(r"python 3\.\d+\.\d+, permjax .*, jax \d+\.\d+", metrics["versions"])
    assert metrics["device"] == "4 x cpu"
    assert all(isinstance(value, float | int | str | bool) for value in metrics.values())
    assert metrics.keys() - OUTCOME.metrics.keys() == set(PROVENANCE)


def test_the_configuration_and_the_models_read_back(folder):
    assert load_config(folder / "config.toml", [], {"study": Config}) == Config()
    kernel = open_checkpoint(folder / "model" / "a.safetensors")["dense/kernel"].read()
    np.testing.assert_array_equal(kernel, OUTCOME.models["a"]["dense/kernel"])


def test_the_page_asks_for_nothing_outside_itself(page, folder):
    html = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", (folder / "report.html").read_text())
    assert not re.search(r"http|url\(|@import|//", html)
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    sources = [attrs.get("src") or attrs.get("srcset") for tag, attrs in page.tags if tag in ("img", "source")]
    assert len(sources) == 2
    for source in sources:
        picture = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert Image.open(io.BytesIO(picture)).format == "PNG"


def test_the_page_tells_title_numbers_tables_captions_spec_versions_and_command(page, folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    wanted = ["A study of <b>units</b>", "Two networks & one plan.", "0.012", "0.500", "In nats.", "Along <the> line."]
    wanted += ["over <2> leaves", "permjax run study.toml --set 'title=a b'", "width = 8", metrics["versions"]]
    for text in [*wanted, *OUTCOME.metrics, metrics["config_hash"], metrics["device"]]:
        assert text in page.text


def test_the_page_fits_phones_and_dark_rooms(page, folder):
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert ("source", "(prefers-color-scheme: dark)") in [(tag, attrs.get("media")) for tag, attrs in page.tags]
    assert "prefers-color-scheme: dark" in (folder / "report.html").read_text()


def test_an_outcome_of_numbers_alone_is_a_report_too(tmp_path):
    write_report(Outcome("Title", "Summary.", {"x": 1}), tmp_path, Config(), command="permjax", seconds=0.0)
    assert not (tmp_path / "figures").exists()
    assert not (tmp_path / "model").exists()
    assert "Title" in (tmp_path / "report.html").read_text()


def test_surfaces_and_matrices_stand_in_a_report_with_words_for_those_who_cannot_see_them(tmp_path):
    edges = np.array([0.0, 1.0, 0.5])
    surface = Contour("plane", "Plane", "Of three models.", "", "", "test loss", edges, edges**2, edges)
    matrix = Matrix("pairs", "Pairs", "All pairs.", "model", "other", "barrier", ["a"], ["b", "c"], np.ones((1, 2)))
    write_report(OUTCOME._replace(figures=(surface, matrix)), tmp_path, Config(), command="permjax", seconds=0.0)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"plane.png", "pairs.png"}
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    texts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert texts == ["Plane: level lines of test loss", "Pairs: barrier by other and model"]


def test_numbers_that_json_cannot_hold_become_text(tmp_path):
    metrics = {"loss": float("nan"), "height": -np.inf}
    write_report(OUTCOME._replace(metrics=metrics, headline=()), tmp_path, Config(), command="permjax", seconds=0.0)
    written = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert (written["loss"], written["height"]) == ("nan", "-inf")


def test_a_run_that_dies_while_it_writes_is_not_complete(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(permjax.report, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        write_report(OUTCOME, tmp_path, Config(), command="permjax", seconds=0.0)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": {"device": "mine"}, "headline": ()}, "metric 'device'"),
        ({"metrics": {"seed": 7}, "headline": ()}, "metric 'seed'"),
        ({"metrics": {"losses": [1.0, 2.0]}, "headline": ()}, "metric 'losses' is list"),
        ({"metrics": {"losses": np.ones(2)}, "headline": ()}, "metric 'losses' is ndarray"),
        ({"headline": ("acc",)}, "headline names 'acc'"),
        ({"figures": (FIGURE, FIGURE)}, "Two figures have the name 'loss'"),
        ({"tables": (Table("T", ("a", "b"), ((1,),)),)}, "table 'T' has 1 cells for 2 columns"),
    ],
)
def test_an_outcome_that_cannot_be_told_is_refused_before_anything_is_written(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        write_report(OUTCOME._replace(**change), tmp_path / "out", Config(), command="permjax", seconds=0.0)
    assert not (tmp_path / "out").exists()


def test_readers_get_four_digits_words_for_truth_and_no_provenance():
    values = [0.123456, 1234567, True, np.float32(2), "as is", 1e-7, 24621.7, 3e9]
    assert [format_value(v) for v in values] == ["0.1235", "1,234,567", "yes", "2", "as is", "1e-07", "24,622", "3e+09"]
    assert headline({"x": 0.5, "seed": 1, "versions": "v"}) == {"x": "0.5"}
