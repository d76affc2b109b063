"""Plans: scatter labels against gather permutations, files, and bad input."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from permjax.action import permute
from permjax.permutation import identity, invert
from permjax.plan import Plan
from permjax.symmetry.spec import PermutationSpec

pytestmark = pytest.mark.fast

FORMATS = ("json", "safetensors")
CYCLE = np.asarray([1, 2, 0], np.int32)


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


def plan_of(labels: dict, widths: dict, per: dict | None = None) -> Plan:
    return Plan({g: tuple(np.asarray(a) for a in rows) for g, rows in labels.items()}, widths, per or {})


def assert_same_plan(a: Plan, b: Plan):
    assert dict(a.widths) == dict(b.widths)
    assert dict(a.per) == dict(b.per)
    assert list(a.labels) == list(b.labels)
    for group in a.labels:
        for x, y in zip(a.labels[group], b.labels[group], strict=True):
            np.testing.assert_array_equal(x, y, err_msg=group)
            assert x.dtype == y.dtype == np.int32


@pytest.fixture
def partial():
    """Two models of three and four units that share two; a second group whose units cluster."""
    labels = {
        "g": (np.asarray([0, 1, 2]), np.asarray([1, 3, 0, 4])),
        "c": (np.asarray([0, 0, 1]), np.asarray([1, 0, 1])),
    }
    return Plan(labels, {"g": 5, "c": 2})


# scatter and gather


def test_unit_i_of_a_model_goes_to_unit_label_i_of_the_result():
    spec = PermutationSpec.from_axes({"w": (3,)}, {"w": ("g",)})
    plan = plan_of({"g": ([2, 0, 1],)}, {"g": 3})
    model = np.asarray([10, 20, 30])
    result = np.empty(3, int)
    result[plan.labels["g"][0]] = model
    assert permute(spec, plan.permutations(0), {"w": model})["w"].tolist() == result.tolist() == [20, 30, 10]
    assert plan.permutations(0)["g"].tolist() == [1, 2, 0]
    assert Plan.from_permutations(spec, [{"g": CYCLE}]).labels["g"][0].tolist() == [2, 0, 1]


@given(seed=st.integers(0, 2**16))
def test_permutations_come_back_from_a_plan(zoo_spec, draw_permutations, seed):
    given_permutations = [identity(zoo_spec), draw_permutations(zoo_spec, seed), draw_permutations(zoo_spec, seed + 1)]
    plan = Plan.from_permutations(zoo_spec, given_permutations)
    assert plan.models == 3
    for m, p in enumerate(given_permutations):
        assert plan.is_bijective(m)
        for group, rows in plan.permutations(m).items():
            np.testing.assert_array_equal(rows, p[group])
            np.testing.assert_array_equal(plan.labels[group][m], invert(zoo_spec, p)[group])


def test_labels_of_a_per_group_are_indexed_by_the_units_of_the_model_not_of_the_result(zoo, draw_permutations):
    spec = zoo["attention, fused and split"]
    p = draw_permutations(spec, 1)
    plan = Plan.from_permutations(spec, [p])
    heads, dims = plan.labels["head"][0], plan.labels["qk"][0]
    model = np.arange(12).reshape(3, 4)
    result = np.empty_like(model)
    for h in range(3):
        result[heads[h], dims[h]] = model[h]
    for h in range(3):
        np.testing.assert_array_equal(result[h], model[p["head"][h]][p["qk"][h]])


def test_permutations_from_a_device_become_labels_on_the_host():
    spec = PermutationSpec.from_axes({"w": (3,)}, {"w": ("g",)})
    plan = Plan.from_permutations(spec, [{"g": jnp.asarray(CYCLE)}])
    assert type(plan.labels["g"][0]) is np.ndarray


def test_a_plan_without_groups_maps_by_the_empty_permutation():
    spec = PermutationSpec.from_axes({"w": (3,)}, {})
    assert Plan.from_permutations(spec, [{}, {}]).permutations(1) == {}


# partial and many to one


def test_a_partial_or_clustered_plan_has_no_permutation(partial):
    assert not partial.is_bijective(0)
    with raises("model 1, group 'g': 4 units go to 5 labels, not one to one"):
        partial.permutations(1)
    clusters = plan_of({"c": ([0, 0, 1],)}, {"c": 3})
    assert not clusters.is_bijective(0)
    with raises("model 0, group 'c': 3 units go to 3 labels, not one to one"):
        clusters.permutations(0)


def test_one_clustered_row_of_a_per_group_is_enough_to_refuse():
    plan = plan_of({"h": ([0, 1],), "d": ([[0, 1], [1, 1]],)}, {"h": 2, "d": 2}, {"d": ("h",)})
    with raises("group 'd'"):
        plan.permutations(0)


# files


@pytest.mark.parametrize("ending", FORMATS)
def test_plans_survive_a_file(tmp_path, zoo_spec, draw_permutations, ending):
    plan = Plan.from_permutations(zoo_spec, [draw_permutations(zoo_spec, seed) for seed in range(3)])
    path = tmp_path / f"plan.{ending}"
    plan.save(path)
    again = Plan.load(path)
    assert_same_plan(again, plan)
    assert all(type(a) is np.ndarray for rows in again.labels.values() for a in rows)
    for group, rows in again.permutations(2).items():
        np.testing.assert_array_equal(rows, plan.permutations(2)[group])


@pytest.mark.parametrize("ending", FORMATS)
def test_partial_and_clustered_plans_survive_a_file(tmp_path, partial, ending):
    path = tmp_path / f"plan.{ending}"
    partial.save(str(path))
    assert_same_plan(Plan.load(str(path)), partial)


@pytest.mark.parametrize("ending", FORMATS)
def test_group_names_with_slashes_and_transposed_labels_survive_a_file(tmp_path, ending):
    rows = np.asfortranarray([[0, 1, 2], [2, 0, 1]])
    plan = plan_of({"h": ([1, 0],), "0/a:1/units": (rows,)}, {"h": 2, "0/a:1/units": 3}, {"0/a:1/units": ("h",)})
    plan.save(tmp_path / f"plan.{ending}")
    assert_same_plan(Plan.load(tmp_path / f"plan.{ending}"), plan)


def test_only_json_and_safetensors_are_written(tmp_path, partial):
    with raises("not 'plan.npz'"):
        partial.save(tmp_path / "plan.npz")
    with raises("'plan.pkl'"):
        Plan.load(tmp_path / "plan.pkl")
    assert list(tmp_path.iterdir()) == []


def broken_files(plan: Plan):
    good = json.dumps({"widths": {"g": 2}, "per": {}, "labels": {"g": [[0, 1]]}})
    yield "cut.json", good[:-5].encode()
    yield "list.json", b"[1, 2]"
    yield "empty.json", b"{}"
    yield "not text.json", b"\xff\xfe\x00"
    yield "flat labels.json", b'{"widths": {"g": 2}, "per": {}, "labels": [0, 1]}'
    yield "words.json", b'{"widths": {"g": 2}, "per": {}, "labels": {"g": [["a", "b"]]}}'
    yield "ragged.json", b'{"widths": {"g": 2}, "per": {}, "labels": {"g": [[[0, 1], [0]]]}}'
    yield "too wide.json", b'{"widths": {"g": 2}, "per": {}, "labels": {"g": [[0, 2]]}}'
    yield "no labels.json", b'{"widths": {"g": 2, "h": 2}, "per": {}, "labels": {"g": [[0, 1]]}}'
    yield "cut.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{"
    yield "empty.safetensors", b""


def test_damaged_files_are_refused_by_name(tmp_path, partial):
    for name, content in broken_files(partial):
        (tmp_path / name).write_bytes(content)
        with raises(f"'.*{name}' holds no permjax plan"):
            Plan.load(tmp_path / name)


def test_tensors_that_are_no_plan_are_refused_by_name(tmp_path):
    save_file({"w": np.zeros(2)}, tmp_path / "model.safetensors")
    with raises("'.*model.safetensors' holds no permjax plan"):
        Plan.load(tmp_path / "model.safetensors")


def test_a_missing_file_is_reported_as_such(tmp_path):
    for ending in FORMATS:
        with pytest.raises(FileNotFoundError, match="absent"):
            Plan.load(tmp_path / f"absent.{ending}")


# bad input


@pytest.mark.parametrize(
    ("labels", "widths", "pattern"),
    [
        ({"g": ([0, 3],)}, {"g": 3}, r"model 0, group 'g': labels reach from 0 to 3, the result has units 0\.\.2"),
        ({"g": ([0, 1], [-1, 0])}, {"g": 3}, "model 1, group 'g': labels reach from -1 to 0"),
        ({"g": ([0],)}, {}, "plan lacks the width of group 'g'"),
        ({}, {"g": 3}, "plan lacks the labels of group 'g'"),
        ({"g": ([0],), "h": ([0], [0])}, {"g": 1, "h": 1}, "group 'h' has labels for 2 models, others for 1"),
        ({"g": ([0.5],)}, {"g": 1}, "model 0, group 'g': labels must be integers in 1 axes.*float64"),
        ({"g": ([[0, 1]],)}, {"g": 2}, r"model 0, group 'g': labels must be .* of shape \(1, 2\)"),
    ],
)
def test_labels_that_make_no_plan_are_refused_by_model_and_group(labels, widths, pattern):
    with raises(pattern):
        plan_of(labels, widths)


def test_from_permutations_refuses_what_is_no_permutation():
    spec = PermutationSpec.from_axes({"w": (3,)}, {"w": ("g",)})
    with raises("'g' is no bijection"):
        Plan.from_permutations(spec, [{"g": CYCLE}, {"g": np.asarray([0, 0, 2])}])
