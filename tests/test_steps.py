"""Pipelines: a chain is the hand-written sequence, chaining is associative, states say what they lack."""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import jax
import numpy as np
import pytest

from permjax.plan import Plan
from permjax.steps import Chain, MergeState, Result, chain
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

SPEC = PermutationSpec.from_axes({"w": (3,)}, {"w": ("g",)})


class Note(NamedTuple):
    text: str
    key: tuple


@dataclass(frozen=True)
class Affine:
    """A step whose order matters, and which draws."""

    scale: float
    shift: float

    def __call__(self, state):
        state, key = state.split()
        models = tuple({"w": self.scale * m["w"] + self.shift} for m in state.models)
        note = Note(f"{self.scale} {self.shift}", tuple(jax.random.key_data(key).tolist()))
        return state.after(Result(models, None, note))


A, B, C = Affine(2, 1), Affine(-1, 3), Affine(0.5, 0)


@pytest.fixture
def start():
    return MergeState.create(SPEC, [{"w": np.arange(3.0)}, {"w": np.ones(3)}], key=jax.random.key(0))


def assert_same_state(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.models, b.models)
    assert a.infos == b.infos
    assert (jax.random.key_data(a.key) == jax.random.key_data(b.key)).all()


def test_a_chain_is_the_sequence_written_by_hand(start):
    by_hand = C(B(A(start)))
    assert_same_state(chain(A, B, C)(start), by_hand)
    assert [info.text for info in by_hand.infos] == ["2 1", "-1 3", "0.5 0"]
    assert chain(B, A, C)(start).models[0]["w"].tolist() != by_hand.models[0]["w"].tolist()


def test_chaining_is_associative_and_the_empty_chain_is_neutral(start):
    flat = chain(A, B, C)
    assert chain(chain(A, B), C) == chain(A, chain(B, C)) == flat == chain(chain(), A, chain(B, C, chain()))
    assert flat.steps == (A, B, C)
    assert chain()(start) is start
    assert_same_state(Chain((chain(A, B), C))(start), flat(start))


def test_steps_and_chains_compare_hash_and_print_as_values():
    assert chain(Affine(2, 1), B) == chain(A, B)
    assert chain(A, B) != chain(B, A)
    assert len({chain(A, B), chain(A, B), chain(A)}) == 2
    assert "Affine(scale=2, shift=1)" in repr(chain(A, B))


def test_every_split_gives_a_fresh_key_and_leaves_the_old_state_alone(start):
    before = jax.random.key_data(start.key).tolist()
    keys, state = [before], start
    for _ in range(3):
        state, use = state.split()
        keys += [jax.random.key_data(use).tolist(), jax.random.key_data(state.key).tolist()]
    assert len({tuple(k) for k in keys}) == 7
    assert jax.random.key_data(start.key).tolist() == before


def test_a_result_without_a_plan_keeps_the_old_one(start):
    plan = Plan.from_permutations(SPEC, [{"g": np.arange(3, dtype=np.int32)}])
    found = start.after(Result(start.models, plan, "matched"))
    merged = found.after(Result(start.models[:1], None, "merged"))
    assert found.plan is merged.plan is plan
    assert merged.infos == ("matched", "merged")
    assert len(merged.models) == 1


def test_the_rest_of_the_state_passes_through_the_steps_untouched(start):
    given = replace(start, data=[1], eval_data=[2], apply=np.sin, loss=np.cos)
    after = chain(A, B)(given)
    for field in fields(MergeState):
        if field.name not in ("models", "key", "infos"):
            assert getattr(after, field.name) is getattr(given, field.name)


def test_what_a_step_needs_is_given_or_asked_for_by_name(start):
    data = [np.zeros(2)]
    state = MergeState.create(SPEC, iter(start.models), key=start.key, data=data)
    assert state.need("data", "Repair") is data
    assert len(state.models) == 2
    with pytest.raises(ValueError, match=r"Repair needs `apply`; give it to MergeState.create\(..., apply=...\)"):
        state.need("apply", "Repair")


def test_results_unpack_and_are_trees():
    result = Result(({"w": np.ones(2)},), None, Note("x", ()))
    models, plan, info = result
    assert models is result.models
    assert (plan, info.text) == (None, "x")
    doubled = jax.tree.map(lambda x: x if isinstance(x, str) else 2 * x, result)
    assert doubled.models[0]["w"].tolist() == [2, 2]
