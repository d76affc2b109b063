"""The report of a PLeaS run: the promised keys, fair comparisons, and words that say what was done."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from permjax.data.digits import digits
from permjax.experiments.pleas_report import About, report
from permjax.experiments.pleas_rows import METHODS, Rows, check
from permjax.experiments.pleas_scores import Scores
from permjax.experiments.pleas_tasks import make_task
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.report import write_report
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

BUDGETS = (100, 120, 150)
RESIDUALS = {"params/Dense_0/kernel": (0.4, 0.2), "params/Dense_1/kernel": (0.6, 0.25)}


@dataclass(frozen=True)
class Config:
    experiment: ClassVar[str] = "pleas"
    model: Any = MLPConfig(hidden=(8,))
    seed: int = 0


@pytest.fixture(scope="module")
def about():
    net = build(MLPConfig(hidden=(8,)))
    params = net.init(jnp.zeros(2, jnp.uint32))
    spec = trace_spec(net.apply, params, *net.example_inputs(2))
    task = make_task(digits(), "classes")
    return About(task, spec, "1000 unlabelled images", "own", "1000 images of white noise", {"merged": params})


def row(method, budget, seed):
    """Invented scores: later methods are better, higher budgets too, and seeds differ."""
    base = 50 + 2 * list(METHODS).index(method) + (budget - 100) / 10 + seed * (1 + (method == "pleas_owner"))
    residuals = RESIDUALS if method.startswith("pleas") else {}
    return Scores(base + 10, base, 1e6 * budget / 100, 1000 + budget, 2.0, None, residuals)


def invented(methods=METHODS, budgets=BUDGETS, seeds=(0, 1, 2)):
    return {
        seed: {(m, b): row(m, b, seed) for m in methods for b in budgets}
        | {
            ("parents", None): Scores(task=98.0 + seed / 10, flops=1e6, dense_params=1000),
            ("ensemble", None): Scores(98.0 + seed / 10, 90.0, 2e6, 2000),
            ("joint_trained", None): Scores(99.0, 97.0, 1e6, 1000, 30.0),
        }
        for seed in seeds
    }


@pytest.fixture(scope="module")
def outcome(about):
    return report(Config(), about, invented())


def table(outcome, title):
    return next(t for t in outcome.tables if t.title.startswith(title))


def cells(outcome, title, method):
    return next(line for line in table(outcome, title).rows if line[0] == method)


def test_every_promised_key_is_there_and_finite(outcome):
    keys = {f"{m}_{b}_{k}" for m in METHODS for b in BUDGETS for k in ("task", "joint", "flops", "dense_params")}
    keys |= {"ensemble_task", "ensemble_joint", "joint_trained_task", "joint_trained_joint", "parents_task"}
    keys |= {f"seconds_{m}" for m in METHODS} | {"pleas_owner_100_task_std", "parents_task_std"}
    assert keys <= outcome.metrics.keys()
    assert all(np.isfinite(value) for value in outcome.metrics.values())
    assert "parents_joint" not in outcome.metrics


def test_numbers_are_means_over_seeds(outcome):
    scores = [row("pleas_owner", 120, seed).joint for seed in range(3)]
    assert outcome.metrics["pleas_owner_120_joint"] == pytest.approx(np.mean(scores))
    assert outcome.metrics["pleas_owner_120_joint_std"] == pytest.approx(np.std(scores, ddof=1))
    assert outcome.metrics["pleas_owner_120_flops"] == pytest.approx(1.2e6)
    assert (
        cells(outcome, "Joint accuracy", "PLeaS, owner")[2] == f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"
    )


def test_gains_are_against_the_better_of_the_two_activation_permutations(about):
    trials = invented()
    for seed in trials:  # at 150 the other permutation is the better one
        found = trials[seed]["permutation_distance", 150]
        trials[seed]["permutation_distance", 150] = found._replace(joint=80.0)
    outcome = report(Config(), about, trials)
    at_100, at_150 = (cells(outcome, "Gain", "PLeaS, owner")[i] for i in (1, 3))
    expected = [row("pleas_owner", 100, s).joint - row("permutation_correlation", 100, s).joint for s in range(3)]
    assert at_100.startswith(f"{np.mean(expected):+.1f} [")
    assert at_150.startswith(f"{np.mean([row('pleas_owner', 150, s).joint - 80 for s in range(3)]):+.1f} [")
    assert cells(outcome, "Gain", "permutation, correlation")[1] == "baseline"
    assert cells(outcome, "Gain", "permutation, distance")[3] == "baseline"
    low, high = (outcome.metrics[f"pleas_owner_100_joint_gain_{end}"] for end in ("low", "high"))
    assert low < outcome.metrics["pleas_owner_100_joint_gain"] < high


def test_one_seed_has_neither_spread_nor_interval(about):
    outcome = report(Config(), about, invented(seeds=(0,)))
    assert not [key for key in outcome.metrics if key.endswith(("_std", "_low", "_high"))]
    assert "[" not in cells(outcome, "Gain", "PLeaS, owner")[1]
    assert "one pair, so no interval" in table(outcome, "Gain").caption


def test_what_was_not_measured_stays_empty(about):
    trials = invented()
    for rows in trials.values():
        del rows["distill_scratch", 120]
    outcome = report(Config(), about, trials)
    assert cells(outcome, "Joint accuracy", "distilled from scratch")[2] == ""
    assert "distill_scratch_120_joint" not in outcome.metrics
    assert not [t for t in outcome.tables if "probes" in t.title]


def test_probes_have_their_own_table_and_protocol(about):
    trials = invented(methods=("permutation_distance", "pleas_owner"))
    for rows in trials.values():
        for budget in BUDGETS:
            rows["pleas_owner", budget] = rows["pleas_owner", budget]._replace(probe=97.0)
    outcome = report(Config(), about, trials)
    probes = table(outcome, "Accuracy of linear probes")
    assert [line[0] for line in probes.rows] == ["PLeaS, owner"]
    assert probes.caption.startswith("Linear probe: ")
    assert outcome.metrics["pleas_owner_100_probe"] == 97


def test_equal_accuracies_are_shown_once(about):
    def same(scores):
        return scores._replace(joint=scores.task)

    trials = {seed: {key: same(scores) for key, scores in rows.items()} for seed, rows in invented().items()}
    outcome = report(Config(), about, trials)
    assert not [t for t in outcome.tables if t.title.startswith("Joint")]
    assert "both accuracies agree" in table(outcome, "Task accuracy").caption
    assert "pleas_owner_100_joint" in outcome.metrics


def test_captions_name_protocol_calibration_and_what_owner_targets_know(outcome, about):
    for title in ("Task accuracy", "Joint accuracy"):
        caption = table(outcome, title).caption
        assert "Own heads:" in caption
        assert "calibrated on 1000 unlabelled images" in caption
    for title in ("Task accuracy", "Joint accuracy", "Gain", "Distance"):
        assert "‘PLeaS, owner’ and ‘unpermuted fit, owner’ know from which" in table(outcome, title).caption
    without = report(Config(), about, invented(methods=("permutation_distance", "pleas_parallel")))
    assert "know from which" not in table(without, "Joint accuracy").caption


def test_pleas_free_is_named_and_warned_about_only_where_it_is(outcome, about):
    assert "PLeaS-free was calibrated on 1000 images of white noise" in outcome.summary
    assert "white noise" in table(outcome, "Joint accuracy").caption
    without = report(Config(), about, invented(methods=[m for m in METHODS if m != "pleas_free"]))
    assert "PLeaS-free" not in without.summary
    assert "free_joint" not in {figure.name for figure in without.figures}


def test_the_summary_says_so_where_a_control_wins(outcome):
    assert "the best is ‘distilled from scratch’" in outcome.summary
    assert "‘PLeaS, owner’ has" in outcome.summary


def test_costs_are_multiples_of_a_parent(outcome):
    assert cells(outcome, "Cost", "PLeaS, owner")[1:4] == ("1.00 (1.10)", "1.20 (1.12)", "1.50 (1.15)")
    assert cells(outcome, "For comparison", "ensemble")[3] == "2.00"


def test_every_method_is_in_a_figure_and_no_figure_has_more_lines_than_can_be_told_apart(outcome):
    lines = [figure for figure in outcome.figures if figure.kind == "line"]
    drawn = {curve.label for figure in lines for curve in figure.curves}
    assert set(METHODS.values()) | {"ensemble", "trained jointly"} == drawn
    assert max(len(figure.curves) for figure in lines) <= 6
    main = next(figure for figure in lines if figure.name == "cost_joint")
    assert main.curves[0].label == "PLeaS, owner"
    np.testing.assert_allclose(main.curves[0].x, (1.0, 1.2, 1.5))


def test_residuals_are_drawn_at_the_smallest_budget(outcome):
    bars = {figure.name: figure for figure in outcome.figures if figure.kind == "bars"}
    assert {"residual_pleas_parallel", "residual_pleas_owner"} <= bars.keys()
    before, after = bars["residual_pleas_owner"].curves
    np.testing.assert_allclose([before.mean, after.mean], [(0.4, 0.6), (0.2, 0.25)])
    assert "100 %" in bars["residual_pleas_owner"].title


def test_the_page_can_be_written(outcome, tmp_path):
    write_report(outcome, tmp_path, Config(), command="permjax run", seconds=1.0)
    assert (tmp_path / "model" / "merged.safetensors").is_file()
    assert "joint accuracy" in (tmp_path / "report.html").read_text().lower()


def test_trials_that_cannot_be_compared_are_refused():
    trials = invented()
    del trials[1]["pleas_owner", 120]
    with pytest.raises(ValueError, match=r"\('pleas_owner', 120\) was measured for only one of the seeds 0 and 1"):
        check(trials)
    with pytest.raises(ValueError, match="'magic' has no title"):
        check({0: invented()[0] | {("magic", 100): Scores(1.0)}})
    with pytest.raises(ValueError, match="costs are relative"):
        check({0: {("average", 100): Scores(1.0)}})


def test_rows_are_in_the_order_of_the_titles_whatever_the_order_of_measurement():
    backwards = {seed: dict(reversed(rows.items())) for seed, rows in invented().items()}
    assert Rows(backwards).all == Rows(invented()).all
    assert Rows(backwards).methods == list(METHODS)
