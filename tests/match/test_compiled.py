"""Weight matching as one compiled program: it climbs as far as the audited ascent, from many starts at once."""

from functools import cache

import jax
import numpy as np
import pytest

from permjax import tree
from permjax.match.compiled import best_ends, compiled_ascent
from permjax.match.weights import weight_matching
from permjax.permutation import compose, identity, validate

KEY = jax.random.key(0)


def names(spec):
    return tuple(leaf.name for leaf in spec.leaves if leaf.role == "weight")


@cache
def program(spec, **hyper):
    return jax.jit(lambda a, b, start: compiled_ascent(spec, a, b, start, leaves=names(spec), **hyper))


def climb(spec, a, b, start, **hyper):
    return jax.device_get(program(spec, **hyper)(a, b, start))


@pytest.mark.parametrize("solver", ["auction", "optax"])
def test_it_ends_where_the_audited_ascent_ends_too(write_chain, draw_params, solver):
    spec = write_chain((4, 9, 8, 3))
    a, b = draw_params(spec, 0), draw_params(spec, 1)
    found = climb(spec, a, b, identity(spec), solver=solver)
    validate(spec, found.permutations)
    assert found.converged
    again = weight_matching(spec, [a, b], key=KEY, init=[found.permutations])
    for group, rows in again.plan.permutations(1).items():
        np.testing.assert_array_equal(rows, found.permutations[group])
    np.testing.assert_allclose(found.objective, again.info.objective[0, -1], rtol=1e-5)


@pytest.mark.parametrize("name", ["attention with heads", "grouped queries"])
def test_groups_within_groups_are_solved_under_a_trace(networks, plant, name):
    spec = networks[name]
    a, b, truth = plant(spec, 3, noise=0.05)
    found = climb(spec, a, b, identity(spec), solver="optax")
    validate(spec, found.permutations)
    polished = weight_matching(spec, [a, b], key=KEY, init=[found.permutations])
    exact = weight_matching(spec, [a, b], key=KEY, init=[truth])
    assert polished.info.objective[0, -1] >= 0.9 * exact.info.objective[0, -1]


def test_starts_side_by_side_give_what_they_give_alone(write_chain, draw_params, draw_permutations):
    spec = write_chain((4, 7, 6, 3))
    a, b, c = (draw_params(spec, seed) for seed in range(3))
    starts = [[draw_permutations(spec, 10 * m + i) for i in range(3)] for m in range(2)]
    best = best_ends(spec, a, [b, c], starts, leaves=names(spec), solver="optax")
    for other, row, end in zip((b, c), starts, best, strict=True):
        alone = [climb(spec, a, other, start, solver="optax") for start in row]
        winner = max(alone, key=lambda found: found.objective)
        for group, rows in winner.permutations.items():
            np.testing.assert_array_equal(end[group], rows)


def test_vectorized_restarts_are_at_least_as_good_as_one_run(write_chain, draw_params):
    spec = write_chain((4, 12, 10, 3))
    models = [draw_params(spec, seed) for seed in range(3)]
    one = weight_matching(spec, models, key=KEY).info.objective[:, -1]
    many = weight_matching(spec, models, key=KEY, restarts=6, vectorized=True)
    assert (many.info.objective[:, -1] >= one).all()
    assert many.info.converged.all()
    permuted = tree.stack(many.models)
    assert permuted["0/kernel"].shape == (3, 4, 12)


def test_a_program_that_runs_out_of_sweeps_says_so(write_chain, draw_params):
    spec = write_chain((3, 20, 20, 20, 3))
    found = climb(spec, draw_params(spec, 0), draw_params(spec, 1), identity(spec), max_sweeps=1)
    assert not found.converged
    assert found.sweeps == 1


def test_a_start_is_where_it_begins(write_chain, plant):
    spec = write_chain((4, 8, 6, 3))
    a, b, truth = plant(spec, 5)
    found = climb(spec, a, b, truth)
    assert found.sweeps == 1
    for group, rows in compose(spec, identity(spec), truth).items():
        np.testing.assert_array_equal(found.permutations[group], rows)
