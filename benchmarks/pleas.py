"""PLeaS: closed form against Adam, and the time and memory of merging two ResNet-50.

    python benchmarks/pleas.py --cases mlp resnet grams merge
    python benchmarks/pleas.py --cases merge --images 8 --batch 8      # a quick look

Every case has a process of its own with pinned threads.

- `mlp`, `resnet` (77k parameters, BatchNorm): two networks trained on the digits of scikit-learn (pixels doubled),
  aligned by activations and merged at a budget of 1.2 on 1,000 images. Every layer is solved in closed form (Gram in
  float64, Cholesky) and by the released recipe, 400 steps of Adam at 5e-4 with a cosine, from the averaged weights, on
  the same objective, ridge and blocks of zeros included. `adam` takes 32 images a step, in one compiled loop over
  activations that lie ready and unfolded; `adam, full batch` has exact gradients from the Gram. One thread, processor
  time, medians; compilation stands apart, and the parents' forward passes are in neither. `excess` is what Adam leaves
  of the gain of the closed form over the averaged weights, `residual` that of Adam over that of the closed form; over
  the layers where there is something to gain (1 % of the variance of the targets; nothing in the first layer, where
  averaging is exact). `worse_than_start`: layers that Adam leaves with a larger objective than it found.
- `grams`: ResNet-50 shapes at 224 px with random weights: one pass for the statistics of all layers, the parents'
  forward passes included, over the compiled forward passes of both parents alone; the two alternate. All positions, and
  64 per image, at the parents' width and at a budget of 1.2.
- `merge`: activation matching, plan and parallel fit of all layers, batch by batch, with the statistics of BatchNorm.
  `formula_gib` is what was resident before the fit, the Grams of all layers (8 (k^2 + k n) bytes for k inputs with
  their windows and n outputs), and five matrices like the largest one (sums over batches, solution). The activations of
  a batch stand beside the Grams, but before the solutions: they show with large batches only.

For the last two, plain seconds and those of the processor on all threads.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from permjax import tree
from permjax.data.digits import digits
from permjax.match.activations import activation_matching
from permjax.merge import fitting
from permjax.merge.block_apply import block_apply
from permjax.merge.gram import Gram
from permjax.merge.layer import Layer
from permjax.merge.planning import pleas_plan
from permjax.merge.pleas import pleas, pleas_statistics
from permjax.merge.ridge import residual, solve
from permjax.nets.base import Net, batch_statistics
from permjax.nets.registry import build, config_from_dict
from permjax.symmetry.trace import trace_spec
from permjax.train import TrainConfig, train

RESULT = Path(__file__).parent / "results" / "pleas.json"
BUDGET, SAMPLES, STEPS, RATE, BATCH, GAIN = 1.2, 1000, 400, 5e-4, 32, 0.01
SMALL = {
    "mlp": {"model_type": "mlp", "input_shape": [16, 16], "hidden": [256] * 3},
    "resnet": {"model_type": "resnet", "input_shape": [16, 16], "blocks": [1, 1, 1], "norm": "batch"},
}
RESNET50 = {"model_type": "resnet", "input_shape": [224, 224, 3], "channels": [64, 128, 256, 512]}
RESNET50 |= {"blocks": [3, 4, 6, 3], "classes": 1000, "norm": "batch", "block": "bottleneck", "stem": "imagenet"}
GIB = 1 << 30


class Clock(NamedTuple):
    """Plain seconds, and seconds of processor time."""

    plain: float
    processor: float


def clocked(function: Callable[[], Any]) -> tuple[Any, Clock]:
    plain, processor = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(function())
    return result, Clock(time.perf_counter() - plain, time.process_time() - processor)


def repeated(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Processor time of a function, median, and of its first call beyond that: its compilation."""
    first, *times = [clocked(function)[1].processor for _ in range(repeats + 1)]
    return median(times), max(first - median(times), 0.0)


# closed form against Adam


class Problem(NamedTuple):
    """The least squares of one layer, and the inputs and targets it is made of."""

    layer: Layer
    x: Any
    y: Any
    gram: Gram
    prior: np.ndarray
    ridge: float
    blocks: Any

    @property
    def penalty(self) -> np.ndarray:
        """The weight of the prior for every input, relative to the number of rows."""
        free = int(self.gram.bias)
        square = np.diagonal(np.asarray(self.gram.inputs))[: len(self.prior) - free].mean()
        return np.append(np.full(len(self.prior) - free, self.ridge * square / self.gram.rows), np.zeros(free))

    @property
    def mask(self) -> np.ndarray:
        """Where weights may be other than zero."""
        found = np.ones(self.prior.shape) if self.blocks is None else np.zeros(self.prior.shape)
        for columns, outputs in self.blocks or ():
            found[np.ix_(columns, outputs)] = 1
        return found

    def objective(self, weights: np.ndarray) -> float:
        change = self.penalty[:, None] * (np.asarray(weights, np.float64) - self.prior) ** 2
        return float(residual(self.gram, weights).sum() + change.sum())


def problems(case: str) -> list[Problem]:
    """Train, align, plan and merge, and keep the problem of every layer."""
    data, net = digits(), build(config_from_dict(SMALL[case]))
    double = np.ones((1, 2, 2), np.float32)
    data = replace(data, x_train=np.kron(data.x_train, double), x_test=np.kron(data.x_test, double))
    config = TrainConfig(epochs=10, batch_size=BATCH, learning_rate=2e-3, optimizer="adamw", schedule="cosine")
    models = list(tree.unstack(jax.device_get(train(net, data, config, [0, 1]).params)))
    return _problems(net, models, data.x_train[:SAMPLES])


def _problems(net: Net, models: Sequence[Any], x: np.ndarray) -> list[Problem]:
    spec, known, seen = trace_spec(net.apply, models[0], x[:2]), Layer.gram, []
    aligned = activation_matching(spec, models, apply=net.apply, data=[x]).models
    plan = pleas_plan(spec, aligned, apply=net.apply, data=[x], budget=BUDGET)

    def gram(self: Layer, x: Any, y: Any, **options: Any) -> Gram:
        seen.append([self, x, y])
        return known(self, x, y, **options)

    def solved(gram: Gram, prior: Any, *, ridge: float, blocks: Any) -> Any:
        seen[len(found)] += [gram, prior, ridge, blocks]
        found.append(Problem(*seen[len(found)]))
        return solve(gram, prior, ridge=ridge, blocks=blocks)

    found: list[Problem] = []
    Layer.gram, fitting.solve = gram, solved
    pleas(spec, aligned, plan, apply=net.apply, data=[x], batch_statistics=statistics_of(net))
    Layer.gram, fitting.solve = known, solve
    return found


def statistics_of(net: Net) -> Callable | None:
    return partial(batch_statistics, net) if getattr(net.config, "norm", None) == "batch" else None


@jax.jit
def descend(x: Any, y: Any, problem: dict[str, Any], picks: Any) -> Any:
    """Adam on batches of images `x[images, rows, k]`, from the prior."""

    def loss(weights: Any, pick: Any) -> Any:
        error = (x[pick] @ weights - y[pick]).reshape(-1, y.shape[-1])
        pull = (problem["penalty"][:, None] * (weights - problem["prior"]) ** 2).sum()
        return (error**2).sum() / len(error) + pull

    return adam(jax.grad(loss), problem, picks)


@jax.jit
def descend_exactly(gram: Any, cross: Any, problem: dict[str, Any], picks: Any) -> Any:
    """Adam with the gradient on all rows, `gram` and `cross` being means over them."""

    def gradient(weights: Any, _: Any) -> Any:
        pull = problem["penalty"][:, None] * (weights - problem["prior"])
        return 2 * (jnp.matmul(gram, weights, precision="highest") - cross + pull)

    return adam(gradient, problem, picks)


def adam(gradient: Callable[[Any, Any], Any], problem: dict[str, Any], picks: Any) -> Any:
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def step(carry: tuple, pick: Any) -> tuple[tuple, None]:
        weights, state = carry
        updates, state = optimizer.update(problem["mask"] * gradient(weights, pick), state)
        return (optax.apply_updates(weights, updates), state), None

    start = problem["prior"] * problem["mask"]
    return jax.lax.scan(step, (start, optimizer.init(start)), picks)[0][0]


def unfolded(problem: Problem) -> Any:
    """The inputs as rows `[images, positions, k]`, windows spread out, the constant one last."""
    x, window = jnp.asarray(problem.x), problem.layer.contraction.window
    if window is not None:
        numbers = ("NHWC", "HWIO", "NHWC")
        seen = jax.lax.conv_general_dilated_patches(
            x, window.shape, window.strides, window.padding, rhs_dilation=window.dilation, dimension_numbers=numbers
        )
        x = seen.reshape((*seen.shape[:-1], x.shape[-1], -1)).swapaxes(-1, -2)
        x = x.reshape((*seen.shape[:-1], -1))
    x = x.reshape((len(x), -1, x.shape[-1]))
    return jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1) if problem.gram.bias else x


def against_adam(case: str, repeats: int) -> dict[str, Any]:
    found = [compared(problem, repeats) for problem in problems(case)]
    rows: dict[str, Any] = {"case": case, "layers": len(found), "images": SAMPLES, "repeats": repeats}
    for name in ("gram", "solve", "adam", "adam, full batch"):
        rows[name] = {"seconds": sum(f[name][0] for f in found), "compile": sum(f[name][1] for f in found)}
    closed = rows["gram"]["seconds"] + rows["solve"]["seconds"]
    for name in ("adam", "adam, full batch"):
        spent = rows[name]["seconds"] + (rows["gram"]["seconds"] if "full" in name else 0.0)
        rows[name] |= {"over_closed_form": spent / closed}
        rows[name]["worse_than_start"] = sum(f[f"worse, {name}"] for f in found)
        for part in ("residual", "excess"):
            values = [f[f"{part}, {name}"] for f in found if f["gain"] > GAIN]
            rows[name][part] = {"median": median(values), "least": min(values), "largest": max(values)}
    return rows | {"gainful": sum(f["gain"] > GAIN for f in found)}


def compared(problem: Problem, repeats: int) -> dict[str, Any]:
    gram = problem.gram
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)
    rows, targets = unfolded(problem), y.reshape((len(y), -1, y.shape[-1]))
    single = {k: jnp.asarray(getattr(problem, k), jnp.float32) for k in ("prior", "mask", "penalty")}
    order = np.random.default_rng(0)
    epochs = [order.permutation(SAMPLES) for _ in range(-(-STEPS * BATCH // SAMPLES))]
    picks = jnp.asarray(np.concatenate(epochs)[: STEPS * BATCH].reshape(STEPS, BATCH))
    means = [jnp.asarray(np.asarray(a) / gram.rows, jnp.float32) for a in (gram.inputs, gram.cross)]
    jax.clear_caches()
    run = {
        "gram": lambda: problem.layer.gram(x, y).inputs,
        "solve": lambda: solve(gram, problem.prior, ridge=problem.ridge, blocks=problem.blocks).weights,
        "adam": lambda: descend(rows, targets, single, picks),
        "adam, full batch": lambda: descend_exactly(*means, single, picks),
    }
    times = {name: repeated(function, repeats) for name, function in run.items()}
    reached = {name: np.asarray(run[name](), np.float64) for name in ("solve", "adam", "adam, full batch")}
    start = problem.objective(problem.prior * problem.mask)
    best, least = problem.objective(reached["solve"]), residual(gram, reached["solve"]).sum()
    spread = (np.asarray(gram.targets) / gram.rows - np.asarray(gram.cross)[-1] ** 2 / gram.rows**2).sum()
    quality = {"gain": float((start - best) / spread)}
    for name in ("adam", "adam, full batch"):
        quality[f"excess, {name}"] = (problem.objective(reached[name]) - best) / (start - best)
        quality[f"worse, {name}"] = problem.objective(reached[name]) > start
        quality[f"residual, {name}"] = float(residual(gram, reached[name]).sum() / least)
    return {**times, **quality}


# ResNet-50


def resnet50(images: int, batch: int) -> tuple[Net, Any, list[Any], list[np.ndarray]]:
    """Two networks with random weights and the running statistics of a batch, and random images in batches."""
    net = build(config_from_dict(RESNET50))
    x = np.random.default_rng(0).standard_normal((images, *RESNET50["input_shape"]), np.float32)
    refresh = jax.jit(partial(batch_statistics, net))
    models = [jax.device_get(refresh(net.init(jax.random.key(m)), x[:8])) for m in range(2)]
    spec = trace_spec(net.apply, models[0], x[:1], verify=False)
    return net, spec, models, [x[i : i + batch] for i in range(0, images, batch)]


def grams(batch: int, repeats: int) -> dict[str, Any]:
    """Statistics of all layers over forward passes of both parents, by budget and positions."""
    net, spec, models, data = resnet50(batch, batch)
    forward, placed = jax.jit(net.apply), [jax.device_put(model) for model in models]
    rows = []
    for budget in (1.0, BUDGET):
        plan = pleas_plan(spec, models, apply=net.apply, data=data, budget=budget)
        for positions in (None, 64):
            some = {} if positions is None else {"positions": positions, "key": jax.random.key(0)}
            collect = partial(pleas_statistics, spec, models, plan, apply=net.apply, data=data, **some)
            runs = (lambda: [forward(m, *data) for m in placed], lambda run=collect: arrays(run().grams))
            cold = [clocked(run)[1] for run in runs]
            pairs = [[clocked(run)[1] for run in runs] for _ in range(repeats)]
            row = {"budget": budget, "positions": positions, "images": batch}
            for clock in Clock._fields:
                both = [[getattr(c, clock) for c in pair] for pair in pairs]
                ratio = median(b / a for a, b in both)
                row[clock] = {"forward": median(a for a, _ in both), "statistics": median(b for _, b in both)}
                row[clock] |= {"ratio": ratio, "first": getattr(cold[1], clock)}
            rows.append(row)
    return {"case": "grams", "rows": rows}


def arrays(grams: dict[str, tuple[Gram, ...]]) -> list[Any]:
    return [gram.inputs for parts in grams.values() for gram in parts]


def merge(images: int, batch: int, positions: int | None) -> dict[str, Any]:
    """Two ResNet-50 into one, with the seconds and the largest resident memory so far of every stage."""
    net, spec, models, data = resnet50(images, batch)
    stages: dict[str, Any] = {}

    def staged(name: str, function: Callable[[], Any]) -> Any:
        result, clock = clocked(function)
        stages[name] = clock._asdict() | {"peak_gib": peak()}
        return result

    how: dict[str, Any] = {"apply": net.apply, "data": data}
    start = peak()
    matched = staged("matching", lambda: activation_matching(spec, models, **how))
    plan = staged("plan", lambda: pleas_plan(spec, matched.models, budget=BUDGET, **how))
    before = peak()
    some = {} if positions is None else {"positions": positions, "key": jax.random.key(0)}
    how |= {"batch_statistics": statistics_of(net), "at_once": False, **some}
    merged = staged("fit", lambda: pleas(spec, matched.models, plan, **how))
    shapes = [x.shape for x in block_apply(spec, plan, net.apply).wide.wide_spec.leaves if "kernel" in x.name]
    sizes = [(prod(shape[:-1]) + 1, shape[-1]) for shape in shapes]
    held = sum(8 * (k * k + k * n) for k, n in sizes)
    formula = before + (held + 5 * 8 * max(k for k, _ in sizes) ** 2) / GIB
    known = {"images": images, "batch": batch, "positions": positions, "budget": BUDGET}
    memory = {"start_gib": start, "grams_gib": held / GIB, "formula_gib": formula, "peak_gib": peak()}
    seconds = {clock: sum(stage[clock] for stage in stages.values()) for clock in Clock._fields}
    errors = {name: float(np.median(getattr(merged.info, name))) for name in ("before", "after")}
    return {"case": "merge", **known, "seconds": seconds, "stages": stages, **memory, "error": errors}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


# the driver


def fresh(threads: int, *task: object) -> dict:
    """Run one task in a new process with pinned threads."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    flags = f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'} intra_op_parallelism_threads={threads}"
    environment = {**os.environ, **pinned, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"task {task} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(case: str, args: argparse.Namespace) -> dict:
    if case in SMALL:
        return {"threads": 1, **fresh(1, "against_adam", case, args.repeats)}
    if case == "grams":
        return {"threads": args.threads, **fresh(args.threads, "grams", args.batch, args.repeats)}
    return {"threads": args.threads, **fresh(args.threads, "merge", args.images, args.batch, args.positions)}


def about(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("case", "images", "batch", "positions"))


def rounded(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: rounded(value) for name, value in row.items()}
    if isinstance(row, list):
        return [rounded(value) for value in row]
    return float(f"{row:.4g}") if isinstance(row, float) else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*SMALL, "grams", "merge")
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="for ResNet-50")
    parser.add_argument("--images", type=int, default=256, help="of the merge")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--positions", type=int, help="per image, in the merge; all by default")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        name, *rest = args.task
        print(json.dumps(globals()[name](*rest)))
        return
    setting = {name: version(name) for name in ("jax", "optax", "numpy", "scipy")}
    setting |= {"python": platform.python_version(), "cores": os.cpu_count()}
    kept = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for case in args.cases:
        row = rounded(measure(case, args))
        kept = [old for old in kept if about(old) != about(row)] + [row]
        print(json.dumps(row, indent=1), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"setting": setting, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
