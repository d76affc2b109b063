"""Frank-Wolfe against coordinate ascent, and common orders of many models against pairs matched by themselves.

    python benchmarks/frank_wolfe.py --cases mlp resnet trained --pairs 20 --triples 10 --restarts 4

Cases: `mlp` (64-128-128-128-10) and `resnet` (ResNet-20 of width 1) with independent random weights, and `trained`, the
same perceptron trained on the digits of scikit-learn from independent starts. Objectives are inner products in float64.

For every way to search, over all pairs of a case:

- wins: pairs on which it is at least as good as weight matching with default settings, and as weight matching with as
  many restarts; ratio and worst_ratio: objective over that of default weight matching, median and least.
- converged, largest gap (in units of |a| |b|) and median iterations of the best run; seconds of processor time, median.

For triples of models: the sum over pairs and the worst pair, as ratios to those of `merge_many`, and the cycle error.
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from weight_matching import draw, perceptron, resnet20

from permjax.data.digits import digits
from permjax.match.frank_wolfe import frank_wolfe
from permjax.match.many import cycle_error, merge_many, pairwise_maps, pairwise_matching
from permjax.match.objective import pair_objectives, scale
from permjax.match.universe import universe_matching
from permjax.match.weights import weight_matching
from permjax.symmetry.spec import PermutationSpec

RESULT = Path(__file__).parent / "results" / "frank_wolfe.json"
ROUNDING = 1e-12  # the same permutations, summed in another order
WIDTHS = (64, 128, 128, 128, 10)
SPECS = {"mlp": perceptron(WIDTHS), "resnet": resnet20(1), "trained": perceptron(WIDTHS)}


def models_of(case: str, count: int) -> list[dict[str, np.ndarray]]:
    first = [draw(SPECS[case], seed) for seed in range(count)]
    return trained(first) if case == "trained" else first


def trained(models: list[dict[str, np.ndarray]], steps: int = 300) -> list[dict[str, np.ndarray]]:
    """Train perceptrons side by side with Adam on all digits at once, to a training loss near zero."""
    data = digits()
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    x, optimizer, layers = x.reshape(len(x), -1), optax.adam(3e-3), len(WIDTHS) - 1

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        z = x
        for i in range(layers):
            z = (z if i == 0 else jax.nn.relu(z)) @ params[f"{i}/kernel"] + params[f"{i}/bias"]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    def run(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]

    fitted = jax.jit(jax.vmap(run))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *models))
    return [{name: np.asarray(leaf[m]) for name, leaf in fitted.items()} for m in range(len(models))]


def searches(restarts: int) -> dict[str, Any]:
    found = {
        f"init={init}": partial(frank_wolfe, init=init) for init in ("identity", "barycentre", "random", "weights")
    }
    found[f"init=barycentre, restarts={restarts}"] = partial(frank_wolfe, init="barycentre", restarts=restarts)
    found[f"init=weights, restarts={restarts}"] = partial(frank_wolfe, init="weights", restarts=restarts)
    return found


def seconds(method: Any, *args: Any, **hyper: Any) -> tuple[Any, float]:
    start = time.process_time()
    result = method(*args, **hyper)
    return result, time.process_time() - start


def pairs_row(case: str, pairs: int, restarts: int) -> dict[str, Any]:
    spec, models = SPECS[case], models_of(case, 2 * pairs)
    found: dict[str, list[dict]] = {}
    ascents: dict[str, list] = {"default": [], "restarts": [], "seconds": []}
    for pair in range(pairs):
        a, b, key = *models[2 * pair : 2 * pair + 2], jax.random.key(pair)
        plain, spent = seconds(weight_matching, spec, [a, b], key=key)
        many = weight_matching(spec, [a, b], key=key, restarts=restarts)
        for name, result in (("default", plain), ("restarts", many)):
            ascents[name].append(float(result.info.objective[0, -1]))
        ascents["seconds"].append(spent)
        for name, search in searches(restarts).items():
            result, spent = seconds(search, spec, [a, b], key=key)
            found.setdefault(name, []).append(told(result.info, spent, scale([a, b])))
    default, more = np.array(ascents["default"]), np.array(ascents["restarts"])
    head = {"case": case, "pairs": pairs, "weight_matching_restarts_over_default": float(np.median(more / default))}
    rows = {name: summary(records, default, more) for name, records in found.items()}
    return head | {"weight_matching_seconds": float(np.median(ascents["seconds"])), "searches": rows}


def told(info: Any, spent: float, unit: float) -> dict[str, float]:
    kept = {name: getattr(info, name)[0].item() for name in ("polished", "rounded", "iterations", "converged")}
    return kept | {"gap": info.gap[0].item() / unit, "relaxed": info.objective[0, -1].item(), "seconds": spent}


def summary(records: list[dict], default: np.ndarray, more: np.ndarray) -> dict[str, float]:
    column = {name: np.array([record[name] for record in records]) for name in records[0]}
    ratio = column["polished"] / default
    return {
        "wins": int((ratio > 1 - ROUNDING).sum()),
        "strict_wins": int((ratio > 1 + ROUNDING).sum()),
        "wins_over_restarts": int((column["polished"] / more > 1 - ROUNDING).sum()),
        "ratio": float(np.median(ratio)),
        "worst_ratio": float(ratio.min()),
        "best_ratio": float(ratio.max()),
        "lost_by_rounding": float(np.max(1 - column["rounded"] / column["relaxed"])),
        "gained_by_polish": float(np.max(column["polished"] / column["rounded"] - 1)),
        "converged": int(column["converged"].sum()),
        "largest_gap": float(column["gap"].max()),
        "iterations": float(np.median(column["iterations"])),
        "seconds": float(np.median(column["seconds"])),
    }


def triples_row(case: str, triples: int, restarts: int) -> dict[str, Any]:
    spec, models = SPECS[case], models_of(case, 3 * triples)
    records = [compared(spec, models[3 * t : 3 * t + 3], jax.random.key(t), restarts) for t in range(triples)]
    return {"case": case, "triples": triples, "methods": averaged(records)}


def compared(spec: PermutationSpec, models: list, key: jax.Array, restarts: int) -> dict[str, dict[str, float]]:
    alone = partial(weight_matching, key=key)
    pairs = pairwise_matching(spec, models, alone)
    values = [alone(spec, [models[i], models[j]]).info.objective[0, -1] for i, j in pairs]
    found = {"pairs by themselves": {"sum": sum(values), "worst": min(values), "cycle_error": cycle_error(spec, pairs)}}
    universe = partial(universe_matching, key=key)
    methods = {"to the anchor": alone, "merge_many": partial(merge_many, key=key), "universe": universe}
    methods[f"universe, restarts={restarts}"] = partial(universe, restarts=restarts)
    for name, method in methods.items():
        result, spent = seconds(method, spec, models)
        held = pair_objectives(result.models)
        values = [held[pair] for pair in combinations(range(len(models)), 2)]
        error = cycle_error(spec, pairwise_maps(spec, result.plan))
        found[name] = {"sum": sum(values), "worst": min(values), "cycle_error": error, "seconds": spent}
    return found


def averaged(records: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Ratios of sum and worst pair to those of `merge_many`, and plain values of the rest: medians over triples."""
    rows: dict[str, dict[str, float]] = {}
    for name in records[0]:
        ratios = {part: [r[name][part] / r["merge_many"][part] for r in records] for part in ("sum", "worst")}
        rest = {part: [r[name][part] for r in records] for part in records[0][name] if part not in ratios}
        rows[name] = {part: float(np.median(values)) for part, values in (ratios | rest).items()}
        rows[name]["least_sum"] = float(min(ratios["sum"]))
    return rows


def rounded(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: rounded(value) for name, value in row.items()}
    return float(f"{row:.6g}") if isinstance(row, float) else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--triples", type=int, default=10)
    parser.add_argument("--restarts", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    setting = {name: version(name) for name in ("jax", "numpy", "scipy")}
    setting |= {"python": platform.python_version(), "cores": os.cpu_count(), "restarts": args.restarts}
    found: dict[str, Any] = {"setting": setting, "pairs": [], "triples": []}
    for case in args.cases:
        found["pairs"].append(rounded(pairs_row(case, args.pairs, args.restarts)))
        found["triples"].append(rounded(triples_row(case, args.triples, args.restarts)))
        print(json.dumps([found["pairs"][-1], found["triples"][-1]], indent=1), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
