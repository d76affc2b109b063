"""Runs on collapsing models: tiny ones of all three kinds from one cached base, and what their reports say."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.config import ConfigError, load_config, to_dict
from permjax.edit.collapse import Efficacy
from permjax.edit.facts import WorldConfig
from permjax.experiments import collapse_sequential, collapse_signals, collapse_single
from permjax.experiments.collapse_base import BaseConfig, BaseSizeConfig
from permjax.experiments.collapse_editors import EditorsConfig
from permjax.experiments.collapse_guard import GuardConfig
from permjax.experiments.collapse_sequential import CollapseSequentialConfig
from permjax.experiments.collapse_sequential_report import Guard, Point, Run, Stream
from permjax.experiments.collapse_sequential_report import report as sequential_report
from permjax.experiments.collapse_signals import CollapseSignalsConfig
from permjax.experiments.collapse_signals_report import SIGNALS, Sweep
from permjax.experiments.collapse_signals_report import report as signals_report
from permjax.experiments.collapse_single import CollapseSingleConfig
from permjax.experiments.collapse_single_report import Arm, Cell
from permjax.experiments.collapse_single_report import report as single_report
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments
from permjax.train import TrainConfig

# 80 steps: enough to answer a sum with a digit, so that there is something to retain
TINY = BaseConfig(
    WorldConfig(short_names=12, full_names=2, dialects=1, characters=2000),
    size=BaseSizeConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=24),
    rows=640,
    train=TrainConfig(epochs=4, batch_size=32, optimizer="adamw", learning_rate=1e-2),
)


def _settings() -> EditorsConfig:
    """Editors whose searches are short; the tiny covariances have no small eigenvalues."""
    known = EditorsConfig()
    value, block = (replace(one.value, steps=2) for one in (known.rome, known.memit))
    return EditorsConfig(
        replace(known.rome, value=value, ridge=1e-3),
        replace(known.c_rome, value=value, ridge=1e-3),
        replace(known.memit, value=block, ridge=1e-3),
        replace(known.alphaedit, value=block, threshold=1.0),
        replace(known.ft_l, steps=2),
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What all tiny runs have in common."""
    cache = str(tmp_path_factory.mktemp("bases"))
    return {"base": TINY, "settings": _settings(), "covariance_rows": 32, "probe_rows": 32, "cache": cache, "seeds": 1}


def _run(module, config, folder):
    with Progress(visible=False) as progress:
        return module.run(config, folder, progress)


def test_a_short_run_on_single_edits_tells_all_it_should(shared, tmp_path):
    config = CollapseSingleConfig(layouts=("gpt2",), edits=2, directions=1, gammas=(0.0, 8.0), **shared)
    outcome = _run(collapse_single, config, tmp_path)
    for name in config.editors:
        for key in ("share_above_2x", "share_above_1000", "efficacy_bare", "efficacy_prefixed", "efficacy_free"):
            assert 0 <= outcome.metrics[f"{name}_{key}"] <= 1
    assert outcome.metrics["edits"] == 10
    assert np.isfinite(outcome.metrics["rome_denominator_at_gamma_8"])
    assert not (tmp_path / "state").exists()  # the model is in the cache


def test_a_short_run_on_streams_tells_all_it_should(shared, tmp_path):
    guard = GuardConfig(("identity",), ways=("rome", "memit"), calibration=2, keeps=0.01, rows=32)
    config = CollapseSequentialConfig(
        editors=("rome", "alphaedit"), edits=2, checkpoints=(1, 2), streams=("hard",), guard=guard, **shared
    )
    outcome = _run(collapse_sequential, config, tmp_path)
    assert {"rome_ppl_at_2", "identity_rome_ppl_at_2", "alphaedit_retained_at_1"} <= {*outcome.metrics}
    assert "identity_alphaedit_ppl_at_2" not in outcome.metrics
    assert 0 <= outcome.metrics["guarded_accepted_share"] <= 1


def test_a_short_run_on_signals_tells_all_it_should(shared, tmp_path):
    config = CollapseSignalsConfig(edits=2, covariances=("mixture", "identity"), keeps=0.99, **shared)
    outcome = _run(collapse_signals, config, tmp_path)
    assert outcome.metrics["edited_models"] == 16
    assert {f"auc_{key}_{kind}" for key in SIGNALS for kind in ("pooled", "within_min")} <= {*outcome.metrics}


# reports, from numbers made up


def _arm(perplexity, right=1.0):
    perplexity = np.asarray(perplexity, float)
    efficacy = Efficacy(*(np.full(len(perplexity), right) for _ in range(3)))
    return Arm(perplexity, efficacy, np.ones(len(perplexity)), None, 0.1)


@pytest.mark.fast
def test_the_report_on_single_edits_counts_what_is_above():
    config = CollapseSingleConfig(layouts=("gpt2",), editors=("rome", "c_rome"), edits=4, directions=2, gammas=())
    hard = {"rome": _arm([10.0, 21.0, np.nan, 9.0]), "c_rome": _arm([10.0, 10.5, 10.0, 10.0], 0.5)}
    control = {name: _arm([10.0] * 4) for name in hard}
    cells = [Cell("gpt2", 0, number, 10.0, hard, control, {}) for number in range(2)]
    outcome = single_report(config, cells)
    assert outcome.metrics["rome_share_above_2x"] == 0.5
    assert outcome.metrics["rome_share_above_1000"] == 0.25  # what is not a number
    assert outcome.metrics["rome_directions_with_many_above_2x"] == 2
    assert outcome.metrics["c_rome_share_above_1_1x"] == 0
    assert outcome.metrics["rome_control_share_above_2x"] == 0
    assert "of 8 edits each, above twice the base perplexity: ROME 4, C-ROME 0" in outcome.summary
    assert "not fair" in outcome.summary


@pytest.mark.fast
def test_the_report_on_streams_counts_broken_models_and_matches_efficacy():
    config = CollapseSequentialConfig(
        editors=("rome", "memit"),
        edits=4,
        checkpoints=(1, 2, 4),
        streams=("hard",),
        covariances=("identity",),
        guard=GuardConfig(("identity",)),
        seeds=1,
    )

    def points(last, right):
        right = dict.fromkeys(("bare", "prefixed", "free"), right)
        return {count: Point(10 * ratio, ratio, 0.5, right) for count, ratio in ((1, 1.0), (2, 2.0), (4, last))}

    stream = Stream("hard", "identity")
    runs = [Run(stream, "rome", 0, points(50.0, 0.5), 0.1), Run(stream, "memit", 0, points(np.nan, 0.5), 0.1)]
    guard = Guard(
        "identity",
        0,
        Point(12.0, 1.2, 0.9, dict.fromkeys(("bare", "prefixed", "free"), 0.25)),
        ("rome", None) * 2,
        9,
        0.1,
    )
    outcome = sequential_report(config, runs, [guard])
    assert outcome.metrics["editors_above_3x_at_4"] == 2
    assert outcome.metrics["rome_ppl_at_4"] == 500
    assert (outcome.metrics["guarded_ppl_ratio"], outcome.metrics["unguarded_ppl_ratio"]) == (1.2, 50)
    assert outcome.metrics["guarded_accepted_share"] == 0.5
    assert outcome.metrics["unguarded_edits_at_matched_efficacy"] == 2  # one edit holds in both
    assert outcome.metrics["unguarded_ppl_ratio_at_matched_efficacy"] == 2


@pytest.mark.fast
def test_the_report_on_signals_tells_those_that_point_the_wrong_way():
    config = CollapseSignalsConfig(edits=1, covariances=("mixture", "identity"), seeds=1)
    kept = {"mixture": np.array([1.0, 0.5, 0.95]), "identity": np.array([0.2, 0.3, 0.1])}

    def sweep(kind):
        signals = dict.fromkeys(SIGNALS, 1 - kept[kind]) | {"norm": kept[kind]}
        return Sweep(0, kind, "rome", signals, kept[kind], {"sums": kept[kind]})

    outcome = signals_report(config, [sweep("mixture"), sweep("identity")])
    assert outcome.metrics["auc_energy_pooled"] == outcome.metrics["auc_energy_within_min"] == 1
    assert outcome.metrics["auc_norm_pooled"] == 0
    assert outcome.metrics["auc_energy_over_bases"] == 1
    other = sweep("mixture")._replace(seed=1, signals=dict.fromkeys(SIGNALS, 7 - kept["mixture"]))  # another scale
    both = signals_report(config, [sweep("mixture"), sweep("identity"), other])
    assert both.metrics["auc_energy_pooled"] == 1
    assert both.metrics["auc_energy_over_bases"] < 1
    assert np.isnan(outcome.metrics["auc_energy_within_identity"])  # all are broken
    assert outcome.metrics["spearman_ppl_task_mixture"] == pytest.approx(-1)
    assert "norm of the change: 0.00 over all, the wrong way round" in outcome.summary


@pytest.mark.fast
@pytest.mark.parametrize("name", ["collapse_single", "collapse_sequential", "collapse_signals"])
def test_the_shipped_collapse_configs_have_a_header_and_round_trip(name, request):
    path = request.config.rootpath / "configs" / f"{name}.toml"
    kinds = {kind: one.config for kind, one in experiments().items()}
    config = load_config(path, [], kinds)
    assert config.experiment == name
    assert load_config(path, [f"seed={config.seed}"], kinds) == config
    assert to_dict(config)["experiment"] == name
    head = path.read_text(encoding="utf-8").split("experiment =")[0]
    assert all(f"# {word}:" in head for word in ("Paper", "Claim", "Expected", "Seen", "Data", "Time", "Command"))
    assert f"permjax run configs/{name}.toml" in head
    assert len(head.splitlines()) <= 12
    assert max(map(len, head.splitlines())) <= 120


@pytest.mark.fast
def test_collapse_configs_that_cannot_be_run_are_refused():
    with pytest.raises(ValueError, match=r"no editor 'roma'.*rome"):
        CollapseSingleConfig(editors=("roma",))
    with pytest.raises(ValueError, match="at least 1"):
        CollapseSingleConfig(directions=0)
    with pytest.raises(ValueError, match=r"checkpoints \[1, 10\] must ascend"):
        CollapseSequentialConfig(checkpoints=(1, 10))
    with pytest.raises(ValueError, match="need 190 short names"):
        CollapseSequentialConfig(guard=GuardConfig(calibration=65))
    with pytest.raises(ValueError, match="'memit' has no denominator"):
        CollapseSignalsConfig(editors=("memit",))
    kinds = {"collapse_single": CollapseSingleConfig}
    with pytest.raises(ConfigError, match="short names"):
        load_config(None, ["experiment=collapse_single", "base.world.short_names=0"], kinds)
