"""What the paper says of singular vectors, measured on pairs of MNIST networks: distances, Taylor, R, interventions.

    python benchmarks/singular.py --data FOLDER --pairs 6

FOLDER holds images/mnist10k.npz (default: PERMJAX_DATA). Networks are those of configs/rebasin_mnist10k.toml, from the
seeds 0 ... 2 pairs - 1; pairs are disjoint. `--models FILE.npz` keeps them between runs. Barriers are half way, in nats
on the test images. `matched` is weight matching. Reported over pairs, as mean and standard deviation:

- distance: L2 before and after matching with paired one-sided tests, and the least that orthogonal maps would leave;
- taylor: the second-order estimate of the barrier beside the true one;
- r: the metric at every threshold before and after matching, and of the mean of both networks with the first;
- correlation: barriers against R, over the matched pairs, and over all partial matchings (which are not independent);
- partial: barrier and R where the permutation was found from the k largest singular directions alone, or from the rest
  (the function of both networks is kept), for k = 1, 4, 16, 64; none and all 512 are the naive and the matched pair;
- mixed: the same where only the k largest directions of the second network were permuted, or only the rest (its
  function is not kept): height of the loss half way above the mean loss of both networks;
- inputs: mean |v_i . z| / |z| by layer for the largest singular value and for the four quarters of the directions,
  and its rank correlation with the singular value;
- outputs: mean |phi(W_a z) - phi(W_b z)| and its bound by layer, on the inputs of the first network.

On a machine that others use, OPENBLAS_NUM_THREADS=1 makes the decompositions several times faster.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

from permjax import tree
from permjax.action import permute
from permjax.data.registry import load
from permjax.lmc.barrier import interpolate, l2_distance
from permjax.lmc.inputs import input_alignment, output_gap_bound
from permjax.lmc.intervention import intervene, truncate
from permjax.lmc.matrices import matrices
from permjax.lmc.significance import barrier_against_r, paired_test
from permjax.lmc.singular import GAMMAS, analyse
from permjax.lmc.taylor import taylor_barrier
from permjax.match.weights import weight_matching
from permjax.merge.average import average
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.symmetry.capture import capture
from permjax.symmetry.trace import trace_spec
from permjax.train import TrainConfig, accuracy, cross_entropy, train

RESULT = Path(__file__).parent / "results" / "singular.json"
NET = build(MLPConfig(input_shape=(28, 28), hidden=(512, 512, 512)))
RECIPE = TrainConfig(epochs=25, batch_size=250, optimizer="adam", learning_rate=1e-3)
DIRECTIONS = (1, 4, 16, 64)
DOMINANT = 64  # directions whose alignment the bound of the outputs looks at


def metrics(params, x, y):
    logits = NET.apply(params, x)
    return {"loss": cross_entropy(logits, y), "accuracy": accuracy(logits, y)}


def loss(params, x, y):
    return cross_entropy(NET.apply(params, x), y)


def networks(data: Any, count: int, cache: Path | None) -> list[Any]:
    if cache is not None and cache.exists():
        with np.load(cache) as saved:
            return list(tree.unstack(tree.nest(dict(saved))))[:count]
    params = jax.device_get(train(NET, data, RECIPE, range(count)).params)
    if cache is not None:
        np.savez(cache, **tree.flatten(params))
    return list(tree.unstack(params))


# one pair


class Study:
    """One pair of networks, matched, with what is asked about it."""

    def __init__(self, spec: Any, data: Any, a: Any, b: Any, key: jax.Array) -> None:
        self.spec, self.a, self.b, self.key = spec, a, b, key
        self.test = (data.x_test, data.y_test)
        self.matched = weight_matching(spec, (a, b), key=key).models[1]
        self.ends = self.losses(a, b)[[0, 2]].mean()

    def losses(self, a: Any, b: Any) -> np.ndarray:
        return interpolate(metrics, a, b, self.test, points=3)["loss"]

    def height(self, b: Any) -> float:
        """Loss half way to `b` over the mean loss of the two networks."""
        return float(self.losses(self.a, b)[1] - self.ends)

    def report(self) -> dict[str, Any]:
        merged = average(self.spec, (self.a, self.matched)).models[0]
        named = {"naive": self.b, "matched": self.matched, "merged": merged}
        found = analyse(self.spec, self.a, named)
        return {
            "distance": self.distance(found["matched"].distance),
            "taylor": {name: self.taylor(named[name]) for name in ("naive", "matched")},
            "r": {name: dict(zip(map(str, GAMMAS), one.r.total, strict=True)) for name, one in found.items()},
            "aligned_fraction": {name: one.aligned.total for name, one in found.items()},
            "partial": self.sweep(self.partly_matched),
            "mixed": self.sweep(lambda k: intervene(self.spec, self.b, self.matched, k)),
            "inputs": self.inputs(),
            "outputs": {name: self.outputs(named[name]) for name in ("naive", "matched")},
        }

    def distance(self, found: Any) -> dict[str, float]:
        before, after = (l2_distance(self.spec, self.a, b) for b in (self.b, self.matched))
        floor = sum(found.floor.values()) ** 0.5
        return {"before": before, "after": after, "reduction_percent": 100 * (1 - after / before), "floor": floor}

    def taylor(self, b: Any) -> dict[str, float]:
        found = taylor_barrier(loss, self.a, b, self.test)
        return {
            "barrier": self.height(b),
            "estimate": found.barrier,
            "slope": found.slope,
            "curvature": found.curvature,
        }

    def partly_matched(self, k: int) -> tuple[Any, Any]:
        """The second network in the order that one part of the singular directions asks for."""
        parts = zip(*(truncate(self.spec, model, k) for model in (self.a, self.b)), strict=True)
        plans = [weight_matching(self.spec, pair, key=self.key).plan for pair in parts]
        top, rest = (permute(self.spec, plan.permutations(1), self.b) for plan in plans)
        return top, rest

    def sweep(self, make: Callable[[int], tuple[Any, Any]]) -> dict[str, dict[str, dict[str, float]]]:
        models = {f"{part} {k}": b for k in DIRECTIONS for part, b in zip(("top", "rest"), make(k), strict=True)}
        found: dict[str, dict[str, dict[str, float]]] = {"top": {}, "rest": {}}
        for name, one in analyse(self.spec, self.a, models, gammas=(0.0, 0.3)).items():
            part, k = name.split()
            r0, r03 = one.r.total
            found[part][k] = {"height": self.height(models[name]), "r0": r0, "r03": r03}
        return found

    def inputs(self) -> dict[str, dict[str, float]]:
        seen = input_alignment(NET.apply, self.spec, self.a, [self.test[0]])
        return {name: quarters(seen.alignment[name], seen.singular_values[name]) for name in seen.alignment}

    def outputs(self, b: Any) -> dict[str, dict[str, float]]:
        layers = capture(NET.apply, self.spec, self.a, jnp.asarray(self.test[0][:500])).leaves
        here, there = (matrices(self.spec, model) for model in (self.a, b))
        return {name: gap(here[name], there[name], np.asarray(io.input)) for name, io in layers.items()}


def quarters(alignment: np.ndarray, s: np.ndarray) -> dict[str, float]:
    parts = np.array_split(alignment, 4)
    found = {f"quarter{i}": part.mean() for i, part in enumerate(parts, 1)}
    return {"largest": alignment[0], **found, "rank_correlation": spearmanr(alignment, s)[0]}


def gap(a: np.ndarray, b: np.ndarray, z: np.ndarray) -> dict[str, float]:
    """Of layers without their biases; the matrices lie as [out, in]."""
    a, b = (w if w.shape[1] == z.shape[1] else w.T for w in (a, b))
    outputs = [np.maximum(z @ w.T, 0) for w in (a, b)]
    true = np.linalg.norm(outputs[0] - outputs[1], axis=1)
    sizes = np.linalg.norm(outputs[0], axis=1)
    return {"gap": true.mean(), "bound": output_gap_bound(a, b, z, DOMINANT).mean(), "output": sizes.mean()}


# all pairs


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over pairs of every number, where it stands."""
    first = rows[0]
    if isinstance(first, dict):
        return {key: summary([row[key] for row in rows]) for key in first}
    return {"mean": float(np.mean(rows)), "std": float(np.std(rows, ddof=1))}


def tests(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def column(*path: str) -> list[float]:
        return [float(value(row, path)) for row in rows]

    matched = column("taylor", "matched", "barrier")
    partial = [value(row, ("partial", part, str(k))) for row in rows for part in ("top", "rest") for k in DIRECTIONS]
    heights = [float(point["height"]) for point in partial]
    return {
        "l2_reduction": paired_test(column("distance", "before"), column("distance", "after"))._asdict(),
        "barrier_reduction": paired_test(column("taylor", "naive", "barrier"), matched)._asdict(),
        "correlation": {
            "matched_r0": barrier_against_r(matched, column("r", "matched", "0.0"))._asdict(),
            "matched_r03": barrier_against_r(matched, column("r", "matched", "0.3"))._asdict(),
            "partial_r0": barrier_against_r(heights, [float(point["r0"]) for point in partial])._asdict(),
            "partial_r03": barrier_against_r(heights, [float(point["r03"]) for point in partial])._asdict(),
        },
    }


def value(row: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        row = row[key]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("PERMJAX_DATA"))
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    start = time.perf_counter()
    data = load("mnist10k", args.data)
    models = networks(data, 2 * args.pairs, args.models)
    spec = trace_spec(NET.apply, models[0], jnp.asarray(data.x_test[:2]))
    rows = []
    for number, (a, b) in enumerate(zip(models[::2], models[1::2], strict=True)):
        rows.append(Study(spec, data, a, b, jax.random.key(number)).report())
        print(f"pair {number + 1} of {args.pairs}: {time.perf_counter() - start:.0f} s", flush=True)
    found = {"tests": tests(rows), "pairs": summary(rows)}
    setting = {name: version(name) for name in ("jax", "numpy", "scipy")}
    setting |= {
        "python": platform.python_version(),
        "pairs": len(rows),
        "seconds": time.perf_counter() - start,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, **found}, indent=1) + "\n")
    print(json.dumps(found["tests"], indent=1))


if __name__ == "__main__":
    main()
