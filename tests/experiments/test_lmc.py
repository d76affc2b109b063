"""The experiment on three networks: what it measures, on networks and data small enough for a test."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.config import load_config, to_toml
from permjax.experiments.lmc import METHODS, LMCConfig, run
from permjax.match.ste import SteMatching
from permjax.nets.mlp import MLPConfig
from permjax.train import TrainConfig

SMALL = LMCConfig(
    model=MLPConfig(input_shape=(8, 8), hidden=(24, 16)),
    train=TrainConfig(epochs=6, batch_size=100, learning_rate=5e-3),
    ste_permutation=SteMatching("permutation", together=False, steps=10),
    ste_weights=SteMatching("weights", together=False, steps=3),
    points=3,
    match_examples=500,
    plane_points=3,
    plane_examples=100,
)
KEYS = ("barrier_mid_anchor", "barrier_mid_nonanchor", "barrier_max_anchor", "r_gamma0", "r_gamma03")
KEYS += ("l2_reduction_percent", "accuracy_mean3", "seconds")


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
    assert {f"{method}_{key}" for method in METHODS for key in KEYS} <= set(outcome.metrics)
    assert all(np.isfinite(value) for value in outcome.metrics.values())


def test_no_method_loses_to_none(outcome):
    metrics = outcome.metrics
    for method in METHODS[1:]:
        assert metrics[f"{method}_barrier_mid_anchor"] < metrics["none_barrier_mid_anchor"]


def test_weight_matching_reduces_the_distance_and_aligns_singular_vectors(outcome):
    metrics = outcome.metrics
    assert metrics["none_l2_reduction_percent"] == 0
    assert metrics["weight_matching_l2_reduction_percent"] > 5
    assert metrics["weight_matching_r_gamma0"] > metrics["none_r_gamma0"] + 0.02


def test_orders_from_one_plan_are_consistent(outcome):
    assert all(outcome.metrics[f"{method}_cycle_error"] == 0 for method in METHODS)
    assert outcome.metrics["pairwise_cycle_error"] > 0


def test_the_kept_mean_is_that_of_the_kept_networks(outcome):
    kept = outcome.models
    for name, leaf in kept["merged"].items():
        mean = np.mean([kept[stem][name] for stem in ("a", "b_aligned", "c_aligned")], axis=0)
        np.testing.assert_allclose(leaf, mean, rtol=1e-5, atol=1e-6)


def test_figures_show_losses_agreement_spectra_pairs_and_planes(outcome):
    names = {figure.name for figure in outcome.figures}
    assert {"pairs", "loss_anchor", "loss_nonanchor", "r_gamma", "spectra", "plane_none"} <= names


def test_a_search_that_ran_out_of_steps_is_named(outcome):
    assert outcome.metrics["ste_permutation_converged"] is False
    assert "STE, matrices" in outcome.summary.split("Stopped before they converged:")[1]


def test_a_configuration_survives_toml(tmp_path):
    several = replace(SMALL, variants=(MLPConfig(hidden=(8,)), MLPConfig(hidden=(16,))))
    (tmp_path / "c.toml").write_text(to_toml(several))
    assert load_config(tmp_path / "c.toml", [], {"lmc": LMCConfig}) == several


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"triples": 0}, "triples must be at least 1"),
        ({"gammas": (0.0,)}, "gammas must hold 0 and 0.3"),
        ({"ste_weights": SteMatching("permutation")}, "called by their latents"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **wrong)


def test_variants_of_one_kind_are_told_apart(tmp_path):
    few = replace(SMALL, methods=("none", "weight_matching"), plane_points=0, train=TrainConfig(epochs=1))
    several = replace(few, variants=tuple(MLPConfig(input_shape=(8, 8), hidden=(n,)) for n in (8, 9)))
    metrics = run(several, tmp_path, Silent()).metrics
    assert {"none_r_gamma0_mlp_0", "none_r_gamma0_mlp_1"} <= set(metrics)
