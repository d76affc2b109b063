"""The re-basin experiment: what it measures, on networks and data small enough for a test."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.config import load_config, to_toml
from permjax.experiments.networks import DataConfig
from permjax.experiments.rebasin import RebasinConfig, run
from permjax.nets.mlp import MLPConfig
from permjax.nets.vgg import VGGConfig
from permjax.train import TrainConfig

SMALL = RebasinConfig(
    model=MLPConfig(input_shape=(8, 8), hidden=(24, 16)),
    train=TrainConfig(epochs=6, batch_size=100, learning_rate=5e-3),
    pairs=2,
    points=5,
    match_examples=500,
)
KEYS = ["accuracy_a", "accuracy_b", "l2_reduction_percent", "equivalence_error", "seconds_matching"]
KEYS += [
    f"{kind}_{row}"
    for kind in ("accuracy_merged", "barrier_mid", "barrier_max")
    for row in ("naive", "weights", "activations")
]


class Silent:
    """Counts what a progress bar would show."""

    def __init__(self):
        self.stages = []

    def start(self, name, total):
        self.stages.append([name, total, 0])

    def step(self, n=1, **_):
        self.stages[-1][2] += n

    def done(self):
        pass


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    progress = Silent()
    return run(SMALL, tmp_path_factory.mktemp("run"), progress), progress


def test_every_promised_number_is_there_and_finite(outcome):
    metrics = outcome[0].metrics
    assert set(KEYS) <= set(metrics)
    assert all(np.isfinite(value) for value in metrics.values())
    assert {f"{key}_std" for key in KEYS} <= set(metrics)


def test_matching_lowers_the_barrier_and_the_distance_and_changes_no_function(outcome):
    metrics = outcome[0].metrics
    assert metrics["barrier_mid_weights"] < metrics["barrier_mid_naive"]
    assert metrics["l2_reduction_percent"] > 5
    assert metrics["equivalence_error"] < 1e-5


def test_the_largest_barrier_is_never_negative_nor_below_the_middle(outcome):
    metrics = outcome[0].metrics
    for row in ("naive", "random", "weights", "activations"):
        assert metrics[f"barrier_max_{row}"] >= max(0, metrics[f"barrier_mid_{row}"]) - 1e-9


def test_models_of_the_first_pair_are_kept_and_the_merge_is_their_mean(outcome):
    models = outcome[0].models
    for name, leaf in models["merged"].items():
        np.testing.assert_allclose(leaf, (models["a"][name] + models["b_aligned"][name]) / 2, rtol=1e-5, atol=1e-6)


def test_progress_reaches_its_totals(outcome):
    assert all(total == seen for _, total, seen in outcome[1].stages)


def test_the_same_config_gives_the_same_numbers_and_goes_on_from_its_state(outcome, tmp_path):
    first = run(SMALL, tmp_path, Silent())
    again = run(SMALL, tmp_path, Silent())
    for key, value in outcome[0].metrics.items():
        if not key.startswith("seconds"):
            assert first.metrics[key] == again.metrics[key] == pytest.approx(value, abs=1e-9)


def test_several_variants_end_in_their_label(tmp_path):
    config = replace(SMALL, pairs=1, norms=("none", "layer"), controls=False, train=TrainConfig(epochs=1))
    metrics = run(config, tmp_path, Silent()).metrics
    assert {"barrier_mid_naive_none", "barrier_mid_naive_layer"} <= set(metrics)
    with pytest.raises(ValueError, match="no width that could be varied"):
        run(replace(SMALL, widths=(2,)), tmp_path, Silent())


def test_repair_and_reestimation_are_measured(tmp_path):
    config = replace(SMALL, pairs=1, controls=False, normalisation="repair")
    metrics = run(config, tmp_path / "a", Silent()).metrics
    assert "accuracy_merged_weights_repaired" in metrics
    model = VGGConfig(input_shape=(8, 8), layers=(4, "M"), hidden=(8,), norm="batch")
    one = replace(config, model=model, normalisation="auto", train=TrainConfig(epochs=1), match_examples=100)
    batch = run(replace(one, norms=("batch",)), tmp_path / "b", Silent()).metrics
    plain = run(replace(one, normalisation="none"), tmp_path / "c", Silent()).metrics
    assert batch["accuracy_a"] != plain["accuracy_a"]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model.input_shape = \[8, 8\]"):
        run(replace(SMALL, model=MLPConfig(input_shape=(7, 7))), tmp_path, Silent())
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        run(replace(SMALL, pairs=0), tmp_path, Silent())
    with pytest.raises(FileNotFoundError, match="mnist10k"):
        run(replace(SMALL, data=DataConfig("mnist10k", root=str(tmp_path))), tmp_path, Silent())


@pytest.mark.fast
@pytest.mark.parametrize(
    "name", ["rebasin_digits", "rebasin_mnist10k", "rebasin_cifar10_resnet20", "rebasin_cifar10_resnet20_full"]
)
def test_shipped_configs_have_headers_and_round_trip(name, tmp_path, request):
    path = request.config.rootpath / "configs" / f"{name}.toml"
    head = path.read_text().split("experiment =")[0]
    assert all(word in head for word in ("Paper:", "Claim:", "Expected:", "Time:", "Command:  permjax run"))
    config = load_config(path, [], {"rebasin": RebasinConfig})
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml", [], {"rebasin": RebasinConfig}) == config
