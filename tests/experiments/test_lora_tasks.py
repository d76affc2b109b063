"""The experiment on adapters: its tasks, its controls, and what it measures, on models small enough for a test."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.config import load_config, to_toml
from permjax.experiments.lora_tasks import LoraTasksConfig, run
from permjax.experiments.lora_tasks_controls import change, permuted, random_like, regauged
from permjax.experiments.lora_tasks_data import OPERATIONS, Language
from permjax.experiments.lora_tasks_rows import ABLATION, swept_ranks
from permjax.experiments.lora_tasks_scores import module_inputs
from permjax.experiments.lora_tasks_training import (
    AdapterTraining,
    Model,
    SizeConfig,
    adapted,
    modules,
    network,
    train_adapters,
)
from permjax.experiments.registry import experiments
from permjax.lora.pool import Factors
from permjax.train import TrainConfig

WORDS = Language(symbols=4, length=6, known=("first", "last", "largest"), tasks=("second", "smallest"))
SMALL = LoraTasksConfig(
    language=WORDS,
    size=SizeConfig(layers=1, width=16, heads=2, hidden=16),
    base=TrainConfig(epochs=3, batch_size=64, learning_rate=1e-2),
    foundation=1500,
    adapter=AdapterTraining(examples=300, steps=60, batch_size=32, learning_rate=2e-2),
    ranks=(3, 3),
    methods=("lora_lego", "linear", "truncate", "regmean"),
    swept=("truncate",),
    factors=(1.0, 2.0),
    validation=40,
    test=60,
    inputs=8,
    trials=2,
)


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


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    shapes = {"one": (3, 6, 5), "two": (3, 4, 7)}
    return {
        name: Factors(rng.standard_normal((r, i), np.float32), rng.standard_normal((o, r), np.float32))
        for name, (r, i, o) in shapes.items()
    }


def deltas(adapter):
    return {name: factors.b @ factors.a for name, factors in adapter.items()}


# tasks


def by_hand(name, row):
    """The answer, one row at a time, in plain Python."""
    ordered, often = sorted(row), Counter(row)
    return {
        "first": row[0],
        "second": row[1],
        "third": row[2],
        "fourth": row[3],
        "fifth": row[4],
        "sixth": row[5],
        "next_to_last": row[-2],
        "last": row[-1],
        "largest": max(row),
        "second_largest": ordered[-2],
        "second_smallest": ordered[1],
        "smallest": min(row),
        "most_frequent": min(row, key=lambda symbol: (-often[symbol], symbol)),
    }[name]


@pytest.mark.fast
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_answers_are_right(name):
    others = [word for word in OPERATIONS if word != name]
    language = Language(symbols=5, length=7, known=tuple(others[:3]), tasks=(name, others[3]))
    examples = language.examples(language.new(name), 200, np.random.default_rng(0))
    rows = examples.x[:, 1:-1].tolist()
    assert examples.y.tolist() == [by_hand(name, row) for row in rows]
    assert set(examples.x[:, 0]) == {language.symbols}
    assert set(examples.x[:, -1]) == {language.vocabulary - 1}


@pytest.mark.fast
def test_words_keep_their_old_meaning_but_those_of_the_lesson():
    lessons = WORDS.lessons(("smallest",), 400, 0.5, np.random.default_rng(0))
    meanings = WORDS.meanings | WORDS.new("smallest")
    assert [meanings[word] for word in sorted(meanings)] == ["first", "smallest", "largest"]
    asked = zip(lessons.x.tolist(), lessons.y.tolist(), strict=True)
    assert all(answer == by_hand(meanings[x[0]], x[1:-1]) for x, answer in asked)
    assert (lessons.x[:, 0] == WORDS.symbols + 1).sum() == 200


@pytest.mark.fast
def test_questions_of_all_tasks_end_with_the_untouched_words():
    found = WORDS.trials(50, np.random.default_rng(0))
    assert found.x.shape == (3, 50, 8)
    assert [set(words) for words in found.x[:, :, 0]] == [{4}, {5}, {6}]


# adapters


@pytest.mark.fast
def test_changes_of_rank_order_and_gauge_keep_the_function(adapter):
    rng = np.random.default_rng(1)
    for changed in (permuted(adapter, rng), regauged(adapter, rng, 0.7)):
        assert change(adapter, changed) < 1e-6
        assert any(not np.allclose(changed[name].a, adapter[name].a) for name in adapter)
        for name, delta in deltas(adapter).items():
            np.testing.assert_allclose(deltas(changed)[name], delta, rtol=1e-4, atol=1e-5)


@pytest.mark.fast
def test_random_adapters_have_the_ranks_and_norms_of_their_models(adapter):
    drawn = random_like(adapter, np.random.default_rng(1))
    for name, delta in deltas(adapter).items():
        assert drawn[name].a.shape == adapter[name].a.shape
        np.testing.assert_allclose(np.linalg.norm(deltas(drawn)[name]), np.linalg.norm(delta), rtol=1e-5)
    assert change(adapter, drawn) > 1


@pytest.mark.fast
def test_a_change_is_relative_to_the_norm_of_all_updates(adapter):
    doubled = {name: Factors(factors.a, 2 * factors.b) for name, factors in adapter.items()}
    assert change(adapter, doubled) == pytest.approx(1)
    assert change(doubled, adapter) == pytest.approx(0.5)


@pytest.mark.fast
def test_swept_ranks_are_half_the_mean_the_mean_twice_the_mean_and_the_sum():
    assert swept_ranks([2, 2, 4, 4, 8]) == [2, 4, 8, 20]
    assert swept_ranks([1, 1]) == [1, 2]


def test_adapters_of_unequal_ranks_learn_at_once_and_every_module_has_inputs():
    net = network(WORDS, SMALL.size)
    model, rng = Model(net, net.init(jax.random.key(0))), np.random.default_rng(0)
    lessons = [WORDS.lessons((task,), 64, 0.0, rng) for task in WORDS.tasks]
    config = replace(SMALL.adapter, steps=3)
    found = train_adapters(model, lessons, (2, 4), config, jax.random.key(0))
    assert [one["h.0.mlp.c_fc"].a.shape for one in found] == [(2, 16), (4, 16)]
    assert all(np.linalg.norm(delta) > 0 for one in found for delta in deltas(one).values())
    assert set(found[0]) == set(modules(net))
    inputs = module_inputs(model, found, lessons, 5)
    assert inputs["h.0.mlp.c_proj"].shape == (2, 5 * WORDS.tokens, 16)
    x = jnp.asarray(lessons[0].x)
    np.testing.assert_array_equal(net.apply(adapted(model.params, found[0], 0.0), x), net.apply(model.params, x))


# the run


def test_every_promised_number_is_there_and_finite(outcome):
    rows = [*SMALL.methods, "individual", "joint", "base", "random_control", *ABLATION]
    rows += [f"{name}_{kind}" for name in SMALL.methods for kind in ("regauged", "random")]
    rows += [f"{name}_rank_{k}" for name in SMALL.swept for k in (2, 3, 6)]
    rows += [f"{name}_{kind}" for name in ("linear", "lora_lego") for kind in ("permuted", "self", "self_permuted")]
    keys = {f"{row}_accuracy_{kind}" for row in rows for kind in ("mean", "std")}
    keys |= {f"{name}_{kind}" for name in SMALL.methods for kind in ("gauge_change", "scaled_accuracy_mean", "kept")}
    keys |= {f"{name}_{task}_accuracy" for name in SMALL.methods for task in WORDS.tasks}
    keys |= {"lora_lego_over_linear", "lora_lego_over_linear_holds", "linear_self_permuted_change"}
    assert keys <= set(outcome.metrics)
    effects = {key for key, value in outcome.metrics.items() if isinstance(value, str)}
    assert effects == {
        f"lora_lego_{kind}_effect" for kind in ("parameter_gain", "parameter_gain_scaled", "output_gain")
    }
    assert all(np.isfinite(value) for key, value in outcome.metrics.items() if key not in effects)


def test_adapters_know_their_tasks_and_the_base_model_does_not(outcome):
    metrics = outcome.metrics
    assert metrics["individual_accuracy_mean"] > metrics["base_accuracy_mean"] + 25
    assert metrics["truncate_scaled_accuracy_mean"] > metrics["base_accuracy_mean"]


def test_gauges_and_orders_of_ranks_change_what_averages_factors_and_nothing_else(outcome):
    metrics = outcome.metrics
    assert max(metrics[f"{name}_gauge_change"] for name in ("truncate", "regmean")) < 1e-3
    assert min(metrics[f"{name}_gauge_change"] for name in ("linear", "lora_lego")) > 0.05
    assert metrics["linear_self_permuted_change"] > 0.1
    assert metrics["linear_permuted_change"] > 0.05
    assert metrics["lora_lego_self_permuted_change"] < 1e-3


def test_where_the_rank_is_that_of_the_adapters_the_output_scale_is_one(outcome):
    metrics = outcome.metrics
    for kind in ("accuracy_mean", "scaled_accuracy_mean"):
        assert metrics[f"lora_lego_no_output_{kind}"] == pytest.approx(metrics[f"lora_lego_{kind}"])


def test_the_words_follow_the_numbers(outcome):
    metrics, summary = outcome.metrics, outcome.summary
    state = "is above" if metrics["lora_lego_over_linear"] > 0 else "is not above (not reproduced)"
    assert f"LEGO as in the paper {state} averaging factors: {metrics['lora_lego_over_linear']:+.1f}" in summary
    assert metrics["lora_lego_over_linear_holds"] == (metrics["lora_lego_over_linear"] > 0)
    gain = metrics["lora_lego_accuracy_mean"] - metrics["lora_lego_no_parameter_accuracy_mean"]
    assert metrics["lora_lego_parameter_gain"] == pytest.approx(gain)
    assert {figure.name for figure in outcome.figures} == {"methods", "ranks", "tasks"}
    assert len(outcome.tables) == 5
    assert all(key in metrics for key in outcome.headline)


# settings


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("lora_lego", "linaer")}, "no method 'linaer' \\(nearest: 'linear'\\)"),
        ({"methods": ("lora_lego",)}, "must have 'linear'"),
        ({"ranks": (2,)}, "2 tasks need as many ranks"),
        ({"trials": 0}, "at least 1"),
        ({"swept": ("concat",)}, "swept must name one or more of the methods"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"known": ("first", "last", "lagest")}, "no operation 'lagest'"),
        ({"known": ("first", "last", "second")}, "named twice"),
        ({"known": ("first", "last")}, "more words than tasks"),
        ({"length": 5}, "rows of 6 are the least"),
    ],
)
def test_languages_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(WORDS, **changes)


@pytest.mark.fast
def test_the_shipped_config_has_a_header_and_round_trips(tmp_path, request):
    path = request.config.rootpath / "configs" / "lora_tasks.toml"
    head = path.read_text().split("experiment =")[0]
    assert all(word in head for word in ("Paper:", "Claim:", "Expected:", "Time:", "Command:  permjax run"))
    kinds = {kind: experiment.config for kind, experiment in experiments().items()}
    config = load_config(path, [], kinds)
    assert isinstance(config, LoraTasksConfig)
    assert config.trials == 3
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "again.toml", [], kinds) == config
