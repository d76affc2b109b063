import numpy as np
import pytest

from permjax.edit.apply import edit_batch, edit_independent, edit_sequence
from permjax.edit.base import EditResult, Statistics
from permjax.edit.delta import Dense, apply_delta
from permjax.edit.rome import Rome
from permjax.edit.values import Value, ValueSettings

pytestmark = pytest.mark.fast


class Counting:
    """An editor that adds the first token of each edit to a bias, and notes with what it was called."""

    def __init__(self):
        self.calls = []

    def solve(self, net, params, edits, *, chunk=1):
        del net, params
        self.calls.append(("solve", len(edits), chunk))
        numbers = np.asarray([[float(edit.tokens[0, 0])] for edit in edits])
        return Value(numbers, numbers, numbers, numbers, numbers)

    def __call__(self, net, params, edits, *, covariances=None, cache=None, values=None):
        del net
        self.calls.append((float(params["b"][0]), len(edits), covariances, cache, values))
        total = sum(float(edit.tokens[0, 0]) for edit in edits)
        return EditResult({"b": Dense(np.full(1, total, np.float32))}, len(edits), (cache or 0) + len(edits))


@pytest.fixture
def start(edit_case):
    net, params, edits, _ = edit_case("gpt2")
    return net, {**params, "b": np.zeros(1, np.float32)}, edits, [float(edit.tokens[0, 0]) for edit in edits]


def test_a_batch_is_written_by_one_call(start):
    net, params, edits, numbers = start
    editor = Counting()
    found = edit_batch(editor, net, params, edits, chunk=3)
    assert editor.calls[0] == ("solve", 3, 3)
    assert [call[:2] for call in editor.calls[1:]] == [(0.0, 3)]
    assert found.params["b"] == sum(numbers)
    assert params["b"] == 0
    np.testing.assert_array_equal(apply_delta(params, found.delta)["b"], found.params["b"])


def test_a_sequence_writes_into_what_the_edits_before_left_and_keeps_the_first_statistics(start, edit_case):
    net, params, edits, numbers = start
    editor = Counting()
    steps = list(edit_sequence(editor, net, params, edits))
    assert [step.count for step in steps] == [1, 2, 3]
    assert [float(step.params["b"][0]) for step in steps] == list(np.cumsum(numbers))
    befores, sizes, statistics, caches, _ = zip(*editor.calls, strict=True)
    assert list(befores) == [0, *np.cumsum(numbers)[:-1]]
    assert sizes == (1, 1, 1)
    assert caches == (None, 1, 2)
    assert all(isinstance(one, Statistics) and one is statistics[0] for one in statistics)
    assert statistics[0].params is params


def test_a_sequence_of_groups_ends_with_what_is_left(start):
    net, params, edits, numbers = start
    editor = Counting()
    assert [step.count for step in edit_sequence(editor, net, params, edits, size=2)] == [2, 3]
    assert [call[1] for call in editor.calls] == [2, 1]


def test_independent_edits_all_start_from_the_same_model_with_values_searched_together(start):
    net, params, edits, numbers = start
    editor = Counting()
    found = edit_independent(editor, net, params, edits, chunk=2)
    assert editor.calls[0] == ("solve", 3, 2)
    assert [call[0] for call in editor.calls[1:]] == [0, 0, 0]
    assert [float(call[4].delta[0, 0]) for call in editor.calls[1:]] == numbers
    assert [float(delta["b"].value[0]) for delta in found.deltas] == numbers
    assert found.infos == (1, 1, 1)


def test_rome_in_a_sequence_takes_covariances_of_the_first_model_and_others_are_refused(edit_case):
    net, params, edits, covariances = edit_case("gpt2")
    editor = Rome(0, value=ValueSettings(steps=2))
    steps = list(edit_sequence(editor, net, params, edits[:2], covariances=covariances))
    alone = edit_independent(editor, net, params, edits[:2], covariances=covariances)
    name = "transformer.h.0.mlp.c_proj.weight"
    np.testing.assert_allclose(steps[0].delta[name].u, alone.deltas[0][name].u, rtol=1e-6)
    together = edit_batch(editor, net, params, edits[:2], covariances=covariances).delta[name].dense().value
    np.testing.assert_allclose(together, sum(one[name].dense().value for one in alone.deltas), rtol=1e-6)
    assert np.abs(steps[1].delta[name].u - alone.deltas[1][name].u).max() > 1e-6
    assert [info.losses.shape for info in alone.infos] == [(1, 2), (1, 2)]
    with pytest.raises(ValueError, match="collected with other parameters"):
        edit_batch(editor, net, steps[-1].params, edits[2:], covariances=covariances)
