"""Assignment solvers: the auction against SciPy on many small matrices, and a table of times over n.

    python benchmarks/assignment.py --sizes 128 256 512 1024 2048 --matrices 1000 --repeats 5

Times are seconds of processor time of one thread (a busy machine does not stretch them), medians, each also as a
ratio to SciPy; compilation is apart. Reported:

- statistics: how often the auction converged, found SciPy's optimum (up to rounding), and kept its certificate, on
  matrices of all kinds and of n = 1 to 24 and 64, in float32 and float64;
- table: every solver on costs of independent features, of a planted assignment, and uniform ones;
- batch: several costs at once on vmapped solvers, which decides `permjax.match.solvers.choose`;
- warm: `Warm` and an auction with prices over costs that drift, as ratios to cold starts.
"""

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import jax
import lap
import numpy as np
from scipy.optimize import linear_sum_assignment

from permjax.match.assignment import solve
from permjax.match.auction import auction
from permjax.match.warm import Warm

RESULT = Path(__file__).parent / "results" / "assignment.json"
PINNED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
TABLE = ("independent", "planted", "uniform")


# costs


def features(rng: np.random.Generator, n: int, rank: int) -> np.ndarray:
    return rng.standard_normal((n, rank)) @ rng.standard_normal((n, rank)).T


def planted(rng: np.random.Generator, n: int) -> np.ndarray:
    a = rng.standard_normal((n, n // 2 + 8))
    return a @ (a[rng.permutation(n)] + 0.5 * rng.standard_normal(a.shape)).T


def repeated(rng: np.random.Generator, n: int) -> np.ndarray:
    cost = rng.standard_normal((n, n))
    return cost[rng.integers(0, n // 2 + 1, n)][:, rng.integers(0, n // 2 + 1, n)]


def dead(rng: np.random.Generator, n: int) -> np.ndarray:
    cost = rng.standard_normal((n, n))
    cost[rng.permutation(n)[: n // 2]] = 0
    cost[:, rng.permutation(n)[: n // 3]] = 0
    return cost


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "independent": lambda rng, n: features(rng, n, n // 2 + 8),
    "planted": planted,
    "uniform": lambda rng, n: rng.random((n, n)),
    "rank 1": lambda rng, n: features(rng, n, 1),
    "rank 3": lambda rng, n: features(rng, n, 3),
    "ties": lambda rng, n: rng.integers(-2, 3, (n, n)),
    "integers": lambda rng, n: rng.integers(-1000, 1000, (n, n)),
    "repeated rows and columns": repeated,
    "dead units": dead,
    "constant": lambda rng, n: np.full((n, n), rng.standard_normal()),
    "huge": lambda rng, n: 1e30 * rng.standard_normal((n, n)),
    "tiny": lambda rng, n: 1e-30 * rng.standard_normal((n, n)),
    "uneven rows": lambda rng, n: rng.standard_normal((n, n)) + 1e4 * rng.standard_normal((n, 1)),
}


def draw(kind: str, n: int, seed: int) -> np.ndarray:
    return KINDS[kind](np.random.default_rng(seed), n).astype(np.float32)


def value(gain: np.ndarray, columns: Any) -> float:
    return float(gain.astype(np.float64)[np.arange(len(gain)), np.asarray(columns)].sum())


# measurements


def statistics(matrices: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            counts: dict[str, int] = defaultdict(int)
            worst = (0.0, "", 0)
            for seed in range(matrices):
                kind, n = list(KINDS)[seed % len(KINDS)], 64 if seed % 20 == 19 else 1 + seed // len(KINDS) % 24
                gain = draw(kind, n, seed)
                outcome = auction(gain.astype(dtype))
                best = value(gain, linear_sum_assignment(gain, maximize=True)[1])
                rounding = 1e-13 * float(abs(gain.astype(np.float64)).sum(1).sum() / n)
                lacking = best - value(gain, outcome.columns)
                counts["assignments"] += sorted(np.asarray(outcome.columns)) == list(range(n))
                counts["converged"] += bool(outcome.converged)
                counts["optimal"] += lacking <= rounding
                counts["certificate holds"] += lacking <= float(outcome.gap) + rounding
                size = float(np.ptp(gain.astype(np.float64)) or abs(gain).max())
                share = float(outcome.gap) / (n * size)
                worst = max(worst, (share, kind, n))
            found[dtype] = {"matrices": matrices, **counts, "largest gap / (n range), kind, n (range 0: size)": worst}
    return found


def seconds(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    times = []
    for _ in range(repeats):
        begin = process_time()
        result = jax.block_until_ready(function())
        times.append(process_time() - begin)
    return median(times), result


def solvers(n: int) -> dict[str, Callable[[Any], Any]]:
    on_device = {"auction float32": jax.jit(lambda gain: auction(gain).columns)}
    if n <= 1024:
        on_device["optax"] = jax.jit(lambda gain: solve(gain, "optax"))
    return {
        "scipy": lambda gain: solve(gain, "scipy"),
        "lapx": lambda gain: solve(gain, "lapx"),
        "lapx lapjv": lambda gain: lap.lapjv(-gain, return_cost=False)[0],
        "lapx lapjvs, float32": lambda gain: lap.lapjvs(-gain, return_cost=False)[1],
        "lapx lapjvr": lambda gain: lap.lapjvr(-gain, return_cost=False)[1],
        **on_device,
        "auction": lambda gain: solve(gain, "auction"),
    }


def table(sizes: list[int], repeats: int, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows = []
    for n in sizes:
        for kind in TABLE:
            gain, base, best = draw(kind, n, 0), 0.0, 0.0
            for name, run in solvers(n).items():
                if only and name not in only:
                    continue
                once, _ = seconds(lambda run=run, gain=gain: run(gain), 1)
                took, columns = seconds(lambda run=run, gain=gain: run(gain), repeats)
                base, best = base or took, best or value(gain, columns)
                compiled = {"compile": once - took} if name[:5] in ("aucti", "optax") else {}
                lacking = (best - value(gain, columns)) / abs(best)
                row = {"n": n, "kind": kind, "solver": name, "seconds": took, "to scipy": took / base}
                rows.append(row | {"lacks": lacking} | compiled)
                print(rows[-1], flush=True)
    return rows


def batches(sizes: list[int], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for n in (size for size in sizes if size <= 256):
        for count in (1, 16):
            gains = np.stack([draw("independent", n, seed) for seed in range(count)])
            row: dict[str, Any] = {"n": n, "batch": count}
            for name in ("optax", "auction"):
                run = jax.jit(lambda gains, name=name: solve(gains, name))
                seconds(lambda run=run, gains=gains: run(gains), 1)
                row[name] = seconds(lambda run=run, gains=gains: run(gains), repeats)[0]
            rows.append(row | {"auction to optax": row["auction"] / row["optax"]})
            print(rows[-1], flush=True)
    return rows


def drift(kind: str, n: int, noise: float, calls: int = 8) -> list[np.ndarray]:
    rng, first = np.random.default_rng(1), draw(kind, n, 0)
    steps = noise * first.std() * rng.standard_normal((calls - 1, n, n))
    return [first, *(first + np.cumsum(steps, 0)).astype(np.float32)]


def warm(sizes: list[int], noises: tuple[float, ...] = (0.1, 0.02, 0.002)) -> list[dict[str, Any]]:
    rows = []
    for n in (size for size in sizes if size >= 1024):
        for kind in (*TABLE, "rank 3"):
            for noise in noises:
                gains = drift(kind, n, noise)
                row = {"n": n, "kind": kind, "noise": noise}
                for name in ("scipy", "lapx"):
                    row[f"{name} warm to cold"] = ratio(Warm(name), lambda gain, name=name: solve(gain, name), gains)
                row["auction warm to cold"] = ratio(Priced(), lambda gain: auction(gain).columns, gains)
                rows.append(row)
                print(row, flush=True)
    return rows


class Priced:
    """An auction that starts from the prices of the one before."""

    prices = None

    def __call__(self, gain: np.ndarray) -> Any:
        outcome = auction(gain, prices=self.prices)
        self.prices = outcome.prices
        return outcome.columns


def ratio(kept: Callable[[Any], Any], cold: Callable[[Any], Any], gains: list[np.ndarray]) -> float:
    """Time of a warm solver to a cold one, from the third call on; both compiled by the first two."""
    spent = {True: 0.0, False: 0.0}
    for place, gain in enumerate(gains):
        for is_warm, run in ((True, kept), (False, cold)):
            took, columns = seconds(lambda run=run, gain=gain: run(gain), 1)
            spent[is_warm] += took if place > 1 else 0.0
            assert sorted(np.asarray(columns)) == list(range(len(gain)))
    return spent[True] / spent[False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--host-sizes", type=int, nargs="*", default=[4096, 8192], help="for SciPy and lapx, once")
    parser.add_argument("--matrices", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    result = {
        "versions": {name: version(name) for name in ("jax", "optax", "scipy", "lapx", "numpy")},
        "machine": {"python": platform.python_version(), "threads": 1},
        "statistics": statistics(args.matrices),
    }
    print(json.dumps(result["statistics"], indent=1), flush=True)
    result |= {"table": table(args.sizes, args.repeats), "batch": batches(args.sizes, args.repeats)}
    result["table"] += table(args.host_sizes, 1, ("scipy", "lapx"))
    result |= {"warm": warm(args.sizes)}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if any(os.environ.get(name) != setting for name, setting in PINNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PINNED})
    main()
