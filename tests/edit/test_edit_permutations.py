"""Edits commute with the symmetry of the model: to permute and then edit is to edit and then permute."""

from functools import cache

import jax
import numpy as np
import pytest

from permjax.action import permute
from permjax.edit.covariance import Covariance, fingerprint
from permjax.edit.delta import apply_delta, permute_delta
from permjax.edit.memit import Memit
from permjax.edit.places import mlp_place
from permjax.edit.rome import Rome
from permjax.edit.values import ValueSettings, target_nll
from permjax.permutation import random_permutations
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.fast

SHORT = ValueSettings(steps=4)
EDITORS = {"gpt2": Rome(0, value=SHORT), "llama": Memit((0, 1), weight=1e-3, value=SHORT)}


@pytest.fixture(scope="module", params=EDITORS)
def both(request, edit_case):
    """An edit of a model, and of the model with all units permuted, residual stream included."""
    return edited_both(request.param, edit_case)


@cache
def edited_both(name, edit_case):
    net, params, edits, covariances = edit_case(name)
    spec = trace_spec(net.apply, params, edits[0].tokens, verify=False)
    permutations = random_permutations(spec, jax.random.key(1))
    moved = permute(spec, permutations, params)
    mark = fingerprint(moved)
    there = {}
    for layer, one in covariances.items():
        place = mlp_place(net.config, layer)
        axis = spec.leaf(place.weight).axes[0 if place.orientation == "in_out" else 1]
        order = permutations[axis.group]
        assert (order != np.arange(len(order))).any()
        there[layer] = Covariance(one.matrix[order][:, order], one.count, layer, mark)
    editor = EDITORS[name]
    here = editor(net, params, edits, covariances=covariances)
    return name, spec, permutations, here, editor(net, moved, edits, covariances=there)


def test_an_edit_of_the_permuted_model_is_the_permuted_edit(both):
    _, spec, permutations, here, there = both
    for name, one in permute_delta(spec, permutations, here.delta).items():
        mine, wanted = there.delta[name].dense().value, one.dense().value
        np.testing.assert_allclose(mine, wanted, atol=1e-3 * np.abs(wanted).max())
    np.testing.assert_allclose(there.info.losses, here.info.losses, rtol=1e-4)
    np.testing.assert_allclose(there.info.energy, here.info.energy, rtol=1e-3)


def test_a_carried_edit_does_to_the_permuted_model_what_it_does_to_its_own(both, edit_case):
    name, spec, permutations, here, _ = both
    net, params, edits, _ = edit_case(name)
    tokens, targets = (np.stack([getattr(edit, part)[0] for edit in edits]) for part in ("tokens", "targets"))
    run = jax.jit(lambda params, tokens, targets: target_nll(net.apply(params, tokens), targets))
    carried = permute_delta(spec, permutations, here.delta)
    mine = run(apply_delta(params, here.delta), tokens, targets)
    theirs = run(apply_delta(permute(spec, permutations, params), carried), tokens, targets)
    np.testing.assert_allclose(theirs, mine, rtol=1e-3)
    assert mine.mean() < run(params, tokens, targets).mean() - 0.05  # so that something was done
