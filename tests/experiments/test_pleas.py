"""The PLeaS experiment: what it measures, on networks and data small enough for a test."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.config import load_config, to_toml
from permjax.experiments.pleas import PleasConfig, run
from permjax.experiments.pleas_methods import RECIPES, Distillation
from permjax.nets.mlp import MLPConfig
from permjax.train import TrainConfig

SMALL = PleasConfig(
    model=MLPConfig(input_shape=(8, 8), hidden=(24, 16)),
    train=TrainConfig(epochs=10, batch_size=100, learning_rate=5e-3),
    methods=tuple(RECIPES),
    budgets=(100, 200),
    control_budgets=(100,),
    free="smooth_noise",
    calibration=400,
    calibration_batch=400,
    probe_methods=("pleas_owner",),
    distillation=Distillation(steps=60),
)
REFERENCES = ("ensemble_task", "ensemble_joint", "joint_trained_task", "joint_trained_joint", "parents_task")


class Silent:
    """A progress bar that shows nothing."""

    def start(self, *_):
        pass

    def step(self, *_, **__):
        pass

    def done(self):
        pass


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run(SMALL, tmp_path_factory.mktemp("run"), Silent())


def test_every_promised_number_is_there_and_finite(outcome):
    rows = [(m, b) for m in RECIPES for b in (100, 200) if b == 100 or not m.startswith("distill")]
    keys = {f"{m}_{b}_{key}" for m, b in rows for key in ("task", "joint", "flops", "dense_params")}
    keys |= {*REFERENCES, "pleas_owner_100_probe", *(f"seconds_{method}" for method in RECIPES)}
    assert keys <= set(outcome.metrics)
    assert all(np.isfinite(value) for value in outcome.metrics.values())


@pytest.mark.parametrize("method", ["average", "permutation_correlation", "pleas_parallel", "pleas_sequential"])
def test_at_twice_the_cost_a_merge_is_the_ensemble(outcome, method):
    metrics = outcome.metrics
    assert metrics[f"{method}_200_task"] == pytest.approx(metrics["ensemble_task"], abs=0.2)
    assert metrics[f"{method}_200_joint"] == pytest.approx(metrics["ensemble_joint"], abs=0.2)


def test_fitting_repairs_what_merging_breaks(outcome):
    metrics = outcome.metrics
    assert metrics["pleas_owner_100_joint"] > metrics["permutation_correlation_100_joint"] + 5
    assert metrics["pleas_owner_100_joint"] > metrics["average_100_joint"] + 5
    assert metrics["pleas_owner_100_task"] > metrics["parents_task"] - 8


def test_costs_are_those_that_were_asked_for(outcome):
    metrics = outcome.metrics
    one = metrics["parents_flops"]
    assert one <= metrics["pleas_owner_100_flops"] <= 1.1 * one  # the second head comes on top
    assert metrics["pleas_owner_200_flops"] == 2 * one
    assert metrics["pleas_owner_200_dense_params"] > 2 * metrics["parents_dense_params"]


def test_the_report_warns_of_foreign_calibration_and_names_who_knows_owners(outcome):
    captions = " ".join(table.caption for table in outcome.tables)
    assert "smooth noise" in outcome.summary
    assert "know from which parent's domain" in captions


def test_shared_heads_and_several_scenarios_are_told_apart(tmp_path):
    some = ("permutation_correlation", "pleas_owner")
    config = replace(SMALL, scenarios=("halves", "domains"), methods=some, budgets=(150,), free=None, probe_methods=())
    metrics = run(config, tmp_path, Silent()).metrics
    assert metrics["pleas_owner_150_task_halves"] > 80
    assert metrics["pleas_owner_150_joint_domains"] > metrics["permutation_correlation_150_joint_domains"]


def test_the_configuration_survives_toml(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(SMALL))
    assert load_config(path, (), {"pleas": PleasConfig}) == SMALL


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("pleas_ownre",)}, "no method 'pleas_ownre'"),
        ({"budgets": (90,)}, "100 to 200"),
        ({"pairs": 0}, "at least 1"),
        ({"free": None}, "needs the setting `free`"),
    ],
)
def test_what_cannot_be_run_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)
