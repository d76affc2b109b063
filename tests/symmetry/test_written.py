"""Specs survive JSON, and what is no spec is refused."""

import json

import pytest

from permjax.symmetry.spec import Fixed, Group, Leaf, PermutationSpec
from permjax.symmetry.written import spec_from_dict, spec_to_dict

pytestmark = pytest.mark.fast


def test_every_spec_comes_back_from_json(zoo_spec):
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(zoo_spec)))) == zoo_spec


def test_reasons_are_left_out_because_they_are_no_part_of_the_symmetry():
    spec = PermutationSpec((), (Leaf("w", (3,), (Fixed(3, "an equation"),)),))
    assert "equation" not in json.dumps(spec_to_dict(spec))
    assert spec_from_dict(spec_to_dict(spec)) == spec


WRITTEN = spec_to_dict(PermutationSpec.from_axes({"w": (4, 3)}, {"w": ("h", None)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"leaves": {"w": {"shape": [4, 3], "axes": ["h", None], "role": "weight"}}},
        {"leaves": {"w": {"shape": [4, 3], "axes": ["h", {"product": 3}], "role": "weight"}}},
        {"leaves": {"w": {"shape": [5, 3], "axes": ["h", 3], "role": "weight"}}},
        {"leaves": {"w": {"axes": ["h", 3], "role": "weight"}}},
        {"leaves": ["w"]},
        {"groups": 3},
        {"groups": [["h", 4]]},
    ],
)
def test_values_that_are_no_spec_are_refused(changes):
    with pytest.raises(ValueError, match=r"spec|size"):
        spec_from_dict(WRITTEN | changes)


def test_a_missing_table_is_refused():
    with pytest.raises(ValueError, match=r"no permutation spec .*indices"):
        spec_from_dict({key: value for key, value in WRITTEN.items() if key != "indices"})


def test_an_unknown_group_is_refused():
    spec = PermutationSpec((Group("h", 4),), ())
    leaves = {"w": {"shape": [4], "axes": ["g"], "role": "weight"}}
    with pytest.raises(ValueError, match="no group 'g'"):
        spec_from_dict(spec_to_dict(spec) | {"leaves": leaves})
