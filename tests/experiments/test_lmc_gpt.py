"""The experiment on character models: what it measures, on models and text small enough for a test."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.config import load_config, to_toml
from permjax.experiments.lmc_gpt import LmcGptConfig, SizeConfig, TextConfig, run
from permjax.experiments.registry import experiments
from permjax.train import TrainConfig

SMALL = LmcGptConfig(
    size=SizeConfig(layers=1, width=16, heads=2, kv_heads=1, hidden=24),
    data=TextConfig(length=16, characters=20_000),
    train=TrainConfig(epochs=3, batch_size=32, optimizer="adamw", learning_rate=1e-2),
    points=3,
    test_examples=64,
    match_examples=64,
    batch_size=64,
)
ROWS = ("none", "weight_matching", "activation_matching", "none_folded", "weight_matching_folded", "residual")


class Silent:
    def start(self, name, total):
        pass

    def step(self, n=1, **_):
        pass

    def done(self):
        pass


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    return run(SMALL, tmp_path_factory.mktemp("run"), Silent())


def test_every_promised_number_is_there_and_finite(outcome):
    keys = {f"{layout}_{row}_barrier_{kind}" for layout in SMALL.layouts for row in ROWS for kind in ("mid", "max")}
    matched = [row for row in ROWS if not row.startswith("none")]
    keys |= {f"{layout}_{row}_seconds" for layout in SMALL.layouts for row in matched}
    keys |= {f"{layout}_{name}" for layout in SMALL.layouts for name in ("loss_a", "loss_b", "train_seconds")}
    assert keys <= set(outcome.metrics)
    assert all(np.isfinite(value) for value in outcome.metrics.values())


def test_no_alignment_and_no_folding_changes_a_function(outcome):
    errors = {key: value for key, value in outcome.metrics.items() if key.endswith("equivalence_error")}
    assert len(errors) == 2 * 5
    assert max(errors.values()) < 1e-4


def test_turning_the_stream_brings_models_nearer_than_permuting_it(outcome):
    for layout in SMALL.layouts:
        permuted, turned = (
            outcome.metrics[f"{layout}_{row}_l2_reduction_percent"] for row in ("weight_matching_folded", "residual")
        )
        assert turned > permuted > 0


def test_the_largest_barrier_is_never_below_the_middle(outcome):
    for key, value in outcome.metrics.items():
        if key.endswith("_barrier_max"):
            assert value >= max(0, outcome.metrics[key.replace("_max", "_mid")]) - 1e-9


def test_the_report_has_a_table_and_a_figure_for_each_layout(outcome):
    assert [len(table.rows) for table in outcome.tables] == [len(ROWS)] * 2
    assert [figure.name for figure in outcome.figures] == ["loss_gpt2", "loss_llama"]
    assert all(key in outcome.metrics for key in outcome.headline)


def test_a_text_file_takes_the_place_of_invented_sentences_and_several_pairs_have_a_spread(tmp_path):
    (tmp_path / "story.txt").write_text("once upon a time there was a unit. " * 200)
    data = replace(SMALL.data, path="story.txt", root=str(tmp_path))
    config = replace(SMALL, layouts=("gpt2",), pairs=2, data=data, train=TrainConfig(epochs=1))
    outcome = run(config, tmp_path, Silent())
    assert "story" in outcome.summary
    assert not any(key.startswith("llama") for key in outcome.metrics)
    assert all(f"gpt2_{row}_barrier_mid_std" in outcome.metrics for row in ROWS)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="pairs and layouts must be at least one, not 0"):
        run(replace(SMALL, pairs=0), tmp_path, Silent())
    with pytest.raises(FileNotFoundError, match=r"none.txt"):
        run(replace(SMALL, data=TextConfig(path="none.txt", root=str(tmp_path))), tmp_path, Silent())


@pytest.mark.fast
def test_the_shipped_config_has_a_header_and_round_trips(tmp_path, request):
    path = request.config.rootpath / "configs" / "lmc_gpt_shakespeare.toml"
    head = path.read_text().split("experiment =")[0]
    assert all(word in head for word in ("Paper:", "Claim:", "Expected:", "Seen:", "Time:", "Command:  permjax run"))
    kinds = {kind: experiment.config for kind, experiment in experiments().items()}
    config = load_config(path, [], kinds)
    assert isinstance(config, LmcGptConfig)
    assert config.data.path is None
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml", [], kinds) == config
