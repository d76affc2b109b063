"""Plans: for every model and group, the unit of the result to which each of its units goes.

Convention (scatter): unit `i` of model `m` goes to unit `labels[g][m][i]` of the result, which has `widths[g]` units.
For permutations this is the inverse view. Labels that only one model uses are partial matching (a wider result),
several units of one model on one label are clusters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from permjax.files import atomic_path
from permjax.permutation import Permutations, invert
from permjax.symmetry.spec import Group, PermutationSpec


@dataclass(frozen=True, eq=False)
class Plan:
    """Labels of every model's units and the widths of the result.

    Attributes:
        labels: group -> one int32 array `[*per, n_m]` per model, values in 0..width-1.
        widths: group -> number of units in the result.
        per: group -> the groups that index it, as in the spec.
    """

    labels: Mapping[str, tuple[np.ndarray, ...]]
    widths: Mapping[str, int]
    per: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {g: tuple(np.asarray(a) for a in rows) for g, rows in self.labels.items()}
        object.__setattr__(self, "labels", arrays)
        _check(self)
        fixed = {g: tuple(a.astype(np.int32, order="C") for a in rows) for g, rows in arrays.items()}
        object.__setattr__(self, "labels", fixed)

    @property
    def models(self) -> int:
        """Number of models that the plan maps."""
        return len(next(iter(self.labels.values()), ()))

    def is_bijective(self, model: int) -> bool:
        """Tell whether every group of `model` maps one to one onto the result."""
        return all(_one_to_one(self.labels[g][model], width) for g, width in self.widths.items())

    def permutations(self, model: int) -> Permutations:
        """Return the permutation that brings `model` into the order of the result.

        Raises:
            ValueError: names a group in which the map is not one to one.
        """
        for group, width in self.widths.items():
            if not _one_to_one(self.labels[group][model], width):
                seen = self.labels[group][model].shape[-1]
                raise ValueError(
                    f"model {model}, group '{group}': {seen} units go to {width} labels, not one to one; "
                    "a partial or clustered plan has no permutation."
                )
        return invert(self._spec(model), {g: rows[model] for g, rows in self.labels.items()})

    @classmethod
    def from_permutations(cls, spec: PermutationSpec, permutations: Sequence[Mapping[str, Any]]) -> "Plan":
        """Return the plan under which model `m` is gathered by `permutations[m]`."""
        inverses = [invert(spec, {g: np.asarray(v) for g, v in p.items()}) for p in permutations]
        return cls(
            {g.name: tuple(inverse[g.name] for inverse in inverses) for g in spec.groups},
            {g.name: g.size for g in spec.groups},
            {g.name: g.per for g in spec.groups},
        )

    def save(self, path: str | Path) -> None:
        """Write the plan, as JSON or safetensors by the file's ending; the old file survives a failure."""
        path = Path(path)
        head = {"widths": dict(self.widths), "per": {g: list(p) for g, p in self.per.items()}}
        with atomic_path(path) as temporary:
            if _ending(path) == ".json":
                labels = {g: [a.tolist() for a in rows] for g, rows in self.labels.items()}
                temporary.write_text(json.dumps({"format": "permjax-plan", **head, "labels": labels}))
            else:
                arrays = {f"{m}/{g}": a for g, rows in self.labels.items() for m, a in enumerate(rows)}
                save_file(arrays, temporary, metadata={"permjax-plan": json.dumps(head)})

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan written by `save`.

        Raises:
            ValueError: names the file that holds no plan, or a damaged one.
        """
        path = Path(path)
        try:
            head, labels = _read_json(path) if _ending(path) == ".json" else _read_tensors(path)
            per = {g: tuple(p) for g, p in head["per"].items()}
            return cls({g: tuple(labels[g]) for g in head["widths"]}, head["widths"], per)
        except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"'{path}' holds no permjax plan ({error}).") from error

    def _spec(self, model: int) -> PermutationSpec:
        groups = [Group(g, rows[model].shape[-1], self.per.get(g, ())) for g, rows in self.labels.items()]
        known = {g.name for g in groups}
        fixed = {
            name: Group(name, rows[model].shape[i])
            for g, rows in self.labels.items()
            for i, name in enumerate(self.per.get(g, ()))
            if name not in known
        }
        return PermutationSpec(tuple(groups), (), tuple(fixed.values()))


def _check(plan: Plan) -> None:
    if missing := [group for group in plan.widths if group not in plan.labels]:
        raise ValueError(f"plan lacks the labels of group '{missing[0]}'.")
    for group, rows in plan.labels.items():
        if group not in plan.widths:
            raise ValueError(f"plan lacks the width of group '{group}'.")
        if len(rows) != plan.models:
            raise ValueError(f"group '{group}' has labels for {len(rows)} models, others for {plan.models}.")
        rank = 1 + len(plan.per.get(group, ()))
        for model, labels in enumerate(rows):
            if labels.ndim != rank or not np.issubdtype(labels.dtype, np.integer):
                raise ValueError(
                    f"model {model}, group '{group}': labels must be integers in {rank} axes, one for each outer group "
                    f"and the last for the units, not {labels.dtype} of shape {labels.shape}."
                )
            if labels.size and (labels.min() < 0 or labels.max() >= plan.widths[group]):
                raise ValueError(
                    f"model {model}, group '{group}': labels reach from {labels.min()} to {labels.max()}, "
                    f"the result has units 0..{plan.widths[group] - 1}."
                )


def _one_to_one(labels: np.ndarray, width: int) -> bool:
    return labels.shape[-1] == width and bool((np.sort(labels, -1) == np.arange(width)).all())


def _ending(path: Path) -> str:
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"a plan is kept as .json or .safetensors, not '{path.name}'.")
    return path.suffix


def _read_json(path: Path) -> tuple[dict, dict]:
    head = json.loads(path.read_text())
    return head, {g: [np.asarray(a, np.int32) for a in rows] for g, rows in head["labels"].items()}


def _read_tensors(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "np") as handle:
        head = json.loads((handle.metadata() or {})["permjax-plan"])
    arrays = load_file(path)
    count = 1 + max((int(name.split("/", 1)[0]) for name in arrays), default=-1)
    return head, {g: [arrays[f"{m}/{g}"] for m in range(count)] for g in head["widths"]}
