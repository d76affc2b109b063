"""Composing relations: the graphs, the questions, and what commuting relations cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.experiments.nfe_dihedral import (
    NfeDihedralConfig,
    composed,
    composed_queries,
    cycle_graph,
    dihedral_graph,
    known,
    model_family,
    run,
)
from permjax.experiments.nfe_dihedral_report import Scores, report
from permjax.experiments.progress import Progress
from permjax.kge.models import score_all
from permjax.kge.train import KgeTraining


@pytest.mark.fast
def test_the_steps_of_the_graph_are_those_of_the_group():
    graph = dihedral_graph(4)
    value = {entity: int(entity) for entity in graph.entities}
    for h, r, t in graph.train:
        x, y = value[graph.entities[h]], value[graph.entities[t]]
        assert y == (x + 1 if graph.relations[r] == "T" else -x)
    assert len(graph.train) == 8 + 9


@pytest.mark.fast
def test_questions_are_compositions_that_differ_and_stay_in_range():
    x, once_turned, turned_once = (composed_queries(5) - 5).T
    np.testing.assert_array_equal(once_turned, -x + 1)  # T after S
    np.testing.assert_array_equal(turned_once, -(x + 1))  # S after T
    assert (once_turned != turned_once).all()
    assert abs(composed_queries(5) - 5).max() == 5
    assert len(x) == 9


@pytest.mark.fast
def test_numbers_themselves_answer_all_questions_for_affine_relations():
    """One coordinate that is the number, T = (1, 1) and S = (-1, 0), is a perfect model."""
    graph, family = dihedral_graph(5), model_family("affine", 1)
    params = {
        "entity": {"mean": jnp.arange(-5.0, 6.0)[:, None]},
        "relation": {"scale": jnp.array([[1.0], [-1.0]]), "shift": jnp.array([[1.0], [0.0]])},
    }
    assert np.all(known(family, params, jnp.asarray(graph.train)))
    assert np.all(composed(family, params, jnp.asarray(composed_queries(5))))
    params["relation"]["shift"] = jnp.array([[1.0], [1.0]])  # S turns around 1/2
    assert np.mean(composed(family, params, jnp.asarray(composed_queries(5)))) < 0.1


@pytest.mark.fast
@pytest.mark.parametrize("name", ["transe", "distmult", "complex", "rotate"])
def test_where_relations_commute_at_most_half_of_the_answers_are_right(name):
    family, asked = model_family(name, 4), jnp.asarray(composed_queries(4))
    for seed in range(5):
        params = family.init(jax.random.key(seed), 9, 2, 1.0)
        right = np.asarray(composed(family, params, asked))
        assert not (right[0] & right[1]).any()


@pytest.mark.fast
@pytest.mark.parametrize("name", ["affine", "nfe_1", "nfe_2_exact"])
def test_no_random_parameters_rank_a_whole_directed_cycle_first(name):
    family, triples = model_family(name, 4), cycle_graph(3).train
    for seed in range(20):
        params = family.init(jax.random.key(seed), 3, 1, 1.0)
        scores = np.array(score_all(family, params, jnp.asarray(triples[:, 0]), jnp.asarray(triples[:, 1])))
        assert not (scores.argmax(axis=1) == triples[:, 2]).all()


def test_a_short_run_tells_all_it_should(tmp_path):
    training = KgeTraining(learning_rate=0.02, decay=0.995, epochs=60, batch_size=16, valid_every=0)
    config = NfeDihedralConfig(4, (3,), ("nfe_1",), 16, training, cycle_epochs=60, trials=2)
    with Progress(visible=False) as progress:
        outcome = run(config, tmp_path, progress)
    assert outcome.metrics["nfe_1_composition_hits_at_1"] > 0.5
    assert outcome.metrics["nfe_1_cycle_3_hits_at_1"] < 1
    assert {f"{name}_train_hits_at_1" for name in config.models} <= {*outcome.metrics}


@pytest.mark.fast
def test_the_report_says_what_should_not_be():
    one, half = np.ones(2), np.full(2, 0.5)
    found = {"complex": Scores(one, one, {3: one}), "affine": Scores(one, half, {3: one})}
    summary = report(NfeDihedralConfig(4, (3,), ("complex", "affine")), found).summary
    assert "which cannot be: complex" in summary
    assert "cannot do it by theory: affine" in summary


@pytest.mark.fast
def test_what_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match=r"there is no model 'rotat'.*rotate"):
        NfeDihedralConfig(models=("rotat",))
    with pytest.raises(ValueError, match="3 or more edges"):
        NfeDihedralConfig(cycles=(2,))
    with pytest.raises(ValueError, match="trials must be at least 1"):
        NfeDihedralConfig(trials=0)
