"""Weight matching against plain NumPy and SciPy, an eager `jax.numpy` descent, and the floor of its own work.

    python benchmarks/weight_matching.py --cases mlp w1 w4 w8 w16 --seeds 10 --threads 2

Every measurement runs in a fresh process whose thread counts are set before NumPy and JAX are imported. Models are
independent random weights, on which any two descents disagree most. Reported for each case, in seconds:

- cold: the first call in a process, imports apart; warm: the median of later calls.
- ours and auto: `weight_matching` with SciPy's assignment solver, like the others, and with the one it picks itself.
- scipy: a straightforward coordinate descent in NumPy and SciPy; eager: the same in `jax.numpy` without `jit`.
- floor: the same Gram matrices as contiguous matrix products, and the same assignments, nothing else.
- without skipping: every group solved in every sweep; wins: seeds with an objective at least that of `scipy`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_info

from permjax.match import assignment, problem, weights
from permjax.symmetry.spec import Fixed, PermutationSpec

RESULT = Path(__file__).parent / "results" / "weight_matching.json"
CASES = ("mlp", "w1", "w4", "w8", "w16")


# symmetries and models


def perceptron(widths: tuple[int, ...] = (784, 512, 512, 512, 10)) -> PermutationSpec:
    groups = [None, *(f"h{i}" for i in range(1, len(widths) - 1)), None]
    shapes, axes = {}, {}
    for i in range(len(widths) - 1):
        shapes |= {f"{i}/kernel": (widths[i], widths[i + 1]), f"{i}/bias": (widths[i + 1],)}
        axes |= {f"{i}/kernel": (groups[i], groups[i + 1]), f"{i}/bias": (groups[i + 1],)}
    return PermutationSpec.from_axes(shapes, axes)


def resnet20(width: int) -> PermutationSpec:
    """ResNet-20 with norms, kernels `HWIO`: three stages of three blocks, a convolution where the width changes."""
    shapes, axes = {}, {}

    def conv(name: str, size: int, source: tuple, target: tuple) -> None:
        shapes[f"{name}/kernel"] = (size, size, source[1], target[1])
        axes[f"{name}/kernel"] = (None, None, source[0], target[0])
        for part in ("scale", "bias"):
            shapes[f"{name}/norm/{part}"], axes[f"{name}/norm/{part}"] = (target[1],), (target[0],)

    stream = ("stage0", 16 * width)
    conv("stem", 3, (None, 3), stream)
    for stage in range(3):
        target = (f"stage{stage}", 16 * width * 2**stage)
        for block in range(3):
            name, inner = f"stage{stage}/block{block}", (f"stage{stage}/block{block}", target[1])
            conv(f"{name}/conv1", 3, stream, inner)
            conv(f"{name}/conv2", 3, inner, target)
            if stream != target:
                conv(f"{name}/short", 1, stream, target)
            stream = target
    shapes |= {"head/kernel": (stream[1], 10), "head/bias": (10,)}
    axes |= {"head/kernel": (stream[0], None), "head/bias": (None,)}
    return PermutationSpec.from_axes(shapes, axes)


def symmetry(case: str) -> PermutationSpec:
    return perceptron() if case == "mlp" else resnet20(int(case[1:]))


def draw(spec: PermutationSpec, seed: int) -> dict[str, np.ndarray]:
    """Kernels with LeCun's variance, scales of one, biases of zero."""
    rng = np.random.default_rng(seed)

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return np.full(shape, name.endswith("scale"), np.float32)
        return rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(np.prod(shape[:-1])))

    return {found.name: leaf(found.name, found.shape) for found in spec.leaves}


# the three contestants


def descend(spec: PermutationSpec, a: dict, b: dict, seed: int, xp=np) -> dict:
    """A straightforward coordinate descent: every group in every sweep, in random order, from the identity."""
    axes = {leaf.name: [None if isinstance(a, Fixed) else a.group for a in leaf.axes] for leaf in spec.leaves}
    order = {g.name: np.arange(g.size) for g in spec.groups}
    rng = np.random.default_rng(seed)

    def permuted(name: str, but: int | None = None):
        value = b[name]
        for axis, group in enumerate(axes[name]):
            if group is not None and axis != but:
                value = xp.take(value, order[group], axis=axis)
        return value

    for _ in range(100):
        moved = False
        for group in rng.permutation(list(order)):
            n = len(order[group])
            cost = xp.zeros((n, n), np.float32)
            for name, axis, _ in spec.members(group):
                rows = xp.moveaxis(xp.asarray(a[name]), axis, 0).reshape(n, -1)
                cost = cost + rows @ xp.moveaxis(permuted(name, axis), axis, 0).reshape(n, -1).T
            cost = np.asarray(cost, np.float64)
            new = linear_sum_assignment(cost, maximize=True)[1]
            moved |= cost[np.arange(n), new].sum() > cost[np.arange(n), order[group]].sum() + 1e-12
            order[group] = new
        if not moved:
            break
    return {name: permuted(name) for name in b}


def ours(spec: PermutationSpec, a: dict, b: dict, seed: int, solver: str = "scipy") -> dict:
    return weights.weight_matching(spec, [a, b], key=jax.random.key(seed), solver=solver).models[1]


def auto(spec: PermutationSpec, a: dict, b: dict, seed: int) -> dict:
    return ours(spec, a, b, seed, "auto")


def eager(spec: PermutationSpec, a: dict, b: dict, seed: int) -> dict:
    a, b = ({name: jnp.asarray(leaf) for name, leaf in model.items()} for model in (a, b))
    return jax.block_until_ready(descend(spec, a, b, seed, jnp))


METHODS = {"ours": ours, "auto": auto, "scipy": descend, "eager": eager}


# measurements, each in a process of its own


def objective(a: dict, b: dict) -> float:
    return sum(float(np.vdot(a[n].astype(np.float64), np.asarray(b[n], np.float64))) for n in a)


def seconds(run, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def cold(case: str, method: str) -> dict:
    spec = symmetry(case)
    a, b = draw(spec, 0), draw(spec, 1)
    return {"seconds": seconds(lambda: METHODS[method](spec, a, b, 0), 1)}


def warm(case: str, method: str, repeats: int) -> dict:
    spec = symmetry(case)
    a, b = draw(spec, 0), draw(spec, 1)
    METHODS[method](spec, a, b, 0)
    return {"seconds": seconds(lambda: METHODS[method](spec, a, b, 0), repeats)}


def floor(case: str, repeats: int) -> dict:
    """Record the Gram matrices and assignments of one run, and do them again with nothing around them."""
    spec = symmetry(case)
    a, b = draw(spec, 0), draw(spec, 1)
    grams, costs = Counter(), []
    plain, solver = weights.HOST, assignment.SOLVERS["scipy"]

    def gram(x, y, batch, free):
        n = int(np.prod([x.shape[i] for i in free]))
        grams[n, x.size // n] += 1
        return plain.gram(x, y, batch, free)

    def solve(batch):
        costs.extend(-cost for cost in batch)
        return solver(batch)

    weights.HOST, assignment.SOLVERS["scipy"] = plain._replace(gram=gram), solve
    info = weights.weight_matching(spec, [a, b], key=jax.random.key(0), solver="scipy").info
    weights.HOST, assignment.SOLVERS["scipy"] = plain, solver
    products = sum(count * product(n, rest, repeats) for (n, rest), count in grams.items())
    assigning = seconds(lambda: [linear_sum_assignment(cost, maximize=True) for cost in costs], repeats)
    return {"seconds": products + assigning, "grams": products, "assignments": assigning, **tally(info)}


def product(n: int, rest: int, repeats: int) -> float:
    x, y = (np.random.default_rng(s).standard_normal((n, rest), np.float32) for s in (1, 2))
    return seconds(lambda: x @ y.T, max(repeats, 3))


def tally(info) -> dict:
    return {"sweeps": int(info.sweeps[0]), "solves": int(info.solves[0]), "skipped": int(info.skipped[0])}


def unskipped(case: str, repeats: int) -> dict:
    """Time the same ascent without skipping: after every move, every group counts as touched."""
    known = problem.structure

    def forgetful(spec, leaves):
        found = known(spec, leaves)
        return found._replace(near={g: frozenset(found.terms) for g in found.terms})

    problem.structure = forgetful
    return warm(case, "ours", repeats)


def quality(case: str, seeds: int) -> dict:
    """Compare objectives with the plain descent's over seeds."""
    spec = symmetry(case)
    ratios = []
    for seed in range(seeds):
        a, b = draw(spec, 2 * seed), draw(spec, 2 * seed + 1)
        mine, plain = (objective(a, method(spec, a, b, seed)) for method in (ours, descend))
        ratios.append(mine / plain)
    return {"wins": sum(r >= 1 for r in ratios), "seeds": seeds, "ratio": median(ratios), "worst_ratio": min(ratios)}


def pools() -> dict:
    """Tell which thread pools the other measurements had."""
    return {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info()}


# the driver


def fresh(threads: int, *task: object) -> dict:
    """Run one measurement in a new process with pinned threads."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} intra_op_parallelism_threads={threads}"
    environment = {**os.environ, **pinned, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def measure(case: str, args: argparse.Namespace) -> dict:
    row: dict = {"case": case}
    for method in METHODS:
        row[f"cold_{method}"] = median(
            fresh(args.threads, "cold", case, method)["seconds"] for _ in range(args.repeats)
        )
        row[f"warm_{method}"] = fresh(args.threads, "warm", case, method, args.repeats)["seconds"]
    bound = fresh(args.threads, "floor", case, args.repeats)
    row |= {"floor": bound.pop("seconds"), **bound}
    row["warm_without_skipping"] = fresh(args.threads, "unskipped", case, args.repeats)["seconds"]
    row["gained_by_skipping"] = 1 - row["warm_ours"] / row["warm_without_skipping"]
    row["warm_over_floor"] = row["warm_ours"] / row["floor"]
    row["warm_scipy_over_ours"] = row["warm_scipy"] / row["warm_ours"]
    row["cold_eager_over_ours"] = row["cold_eager"] / row["cold_ours"]
    row["cold_ours_minus_scipy"] = row["cold_ours"] - row["cold_scipy"]
    return row | fresh(args.threads, "quality", case, args.seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        name, *rest = args.task
        print(json.dumps(globals()[name](*rest)))
        return
    rows = []
    for case in args.cases:
        rows.append(measure(case, args))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, indent=1))
    setting = {name: version(name) for name in ("jax", "numpy", "scipy")}
    setting |= {"python": platform.python_version(), "cores": os.cpu_count(), "pools": fresh(args.threads, "pools")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
