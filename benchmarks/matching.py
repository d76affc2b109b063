"""Weight matching of large models: a planted order found again, the time it takes by kind of work, and the memory.

    python benchmarks/matching.py --cases resnet50 vit_b16 llama_1b width models --threads 2
    python benchmarks/matching.py --cases llama_1b --scale 4       # all widths divided by four

Every run has a process of its own with pinned threads. Models have random weights; the other model is a permuted copy
with noise, all groups moved, heads and inner dimensions included. Llama's two checkpoints are written in bfloat16 to a
temporary folder and read lazily. Reported for each case:

- seconds of the match, of which cost (Gram matrices, gathers and reading), audit (inner products in float64),
  assignment and application (making the aligned model); trace and warm_up (imports and compilation) stand apart;
  cpu_seconds is the time on all cores together, for machines that are shared.
- recovered: share of units that came back to their place; peak_gib: largest resident memory of the process, and
  models_gib: what the two models occupy on disk or in memory.
- floor: the operations of two sweeps at the measured rate of float32 matrix products, and the assignments as measured.
- width: a perceptron of 3 hidden layers at growing width; models: at growing number of models; with the exponents.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.metadata import version
from math import prod
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from scipy.optimize import linear_sum_assignment

from permjax import tree
from permjax.action import permute_leaf
from permjax.io.checkpoint import open_checkpoint
from permjax.match import ascent, problem, weights
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import invert, random_permutations
from permjax.symmetry.spec import Leaf, PermutationSpec
from permjax.symmetry.trace import trace_spec

RESULT = Path(__file__).parent / "results" / "matching.json"
WIDTHS, COUNTS = (256, 512, 1024, 2048), (2, 3, 5, 9)
GIB = 1 << 30


# symmetries and models


def resnet50(scale: int) -> dict:
    channels = [c // scale for c in (64, 128, 256, 512)]
    shape = {"input_shape": [224, 224, 3], "channels": channels, "blocks": [3, 4, 6, 3], "classes": 1000}
    return {"model_type": "resnet", **shape, "norm": "batch", "block": "bottleneck", "stem": "imagenet"}


def vit_b16(scale: int) -> dict:
    shape = {"input_shape": [224, 224, 3], "patch": 16, "depth": 12, "classes": 1000}
    return {"model_type": "vit", **shape, "width": 768 // scale, "heads": 12 // scale, "mlp": 3072 // scale}


def llama_1b(scale: int) -> dict:
    wide = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
    wide |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    shape = {"num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 128}
    return {"model_type": "llama", **{name: size // scale for name, size in wide.items()}, **shape}


def perceptron(width: int) -> dict:
    return {"model_type": "mlp", "input_shape": [28, 28], "hidden": [width] * 3}


CASES: dict[str, Callable[[int], dict]] = {"resnet50": resnet50, "vit_b16": vit_b16, "llama_1b": llama_1b}


def symmetry(config: dict) -> tuple[PermutationSpec, object]:
    """The symmetry of a network, and its abstract parameters."""
    net = build(config_from_dict(config))
    like = jax.eval_shape(net.init, jax.random.key(0))
    return trace_spec(net.apply, like, *net.example_inputs(1), verify=False), like


@lru_cache
def planted(spec: PermutationSpec, model: int) -> dict[str, np.ndarray]:
    """The permutations of a model; the anchor, number 0, has none."""
    return {g: np.asarray(p) for g, p in random_permutations(spec, jax.random.key(model)).items()}


def draw(spec: PermutationSpec, leaf: Leaf, model: int, noise: float) -> np.ndarray:
    """One leaf of a model: the anchor's, with noise of its own, permuted."""
    index = [each.name for each in spec.leaves].index(leaf.name)
    value = np.random.default_rng(index).standard_normal(leaf.shape, np.float32)
    if model == 0:
        return value
    value += np.float32(noise) * np.random.default_rng((index, model)).standard_normal(leaf.shape, np.float32)
    return permute_leaf(spec, leaf, planted(spec, model), value)


def write(config: dict, folder: str, model: int, noise: float) -> dict:
    """Write one model in bfloat16, a file for every layer, with an index."""
    spec, _ = symmetry(config)
    shards: dict[str, list[Leaf]] = defaultdict(list)
    for leaf in spec.leaves:
        shards["-".join(leaf.name.split(".")[:3]) + ".safetensors"].append(leaf)
    for file, leaves in shards.items():
        values = {leaf.name: draw(spec, leaf, model, noise).astype(ml_dtypes.bfloat16) for leaf in leaves}
        save_file(values, Path(folder, file), metadata={"format": "pt"})
    places = {leaf.name: file for file, leaves in shards.items() for leaf in leaves}
    Path(folder, "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return {}


# one run


class Clock:
    """Seconds by kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, kind: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            start = time.perf_counter()
            found = function(*args, **kwargs)
            self.seconds[kind] += time.perf_counter() - start
            return found

        return run


def watch(clock: Clock) -> None:
    """Let the matching of this process tell what it spends its time on."""
    plain = problem.HOST
    kinds = {"view": "cost", "gather": "cost", "gram": "cost", "bend": "cost", "inner": "audit", "gap": "audit"}
    timed = {name: clock.timed(kind, getattr(plain, name)) for name, kind in kinds.items()}
    weights.HOST = plain._replace(**timed)
    ascent.assigned = clock.timed("assignment", ascent.assigned)
    weights.reordered = clock.timed("application", weights.reordered)


def match(config: dict, count: int, noise: float, solver: str, folders: list[str]) -> dict:
    """Match `count` models, read from folders or drawn here, and measure."""
    clock = Clock()
    spec, like = clock.timed("trace", symmetry)(config)
    if folders:
        models = [dict(open_checkpoint(folder)) for folder in folders]
    else:
        models = [tree.map_named(lambda n, _, m=m: draw(spec, spec.leaf(n), m, noise), like) for m in range(count)]
    tiny, small = symmetry(perceptron(8))
    blank = tree.map_named(lambda _, leaf: np.zeros(leaf.shape, np.float32), small)
    clock.timed("warm_up", weights.weight_matching)(tiny, [blank, blank], key=jax.random.key(0))
    lap = clock.timed("lap", lambda cost: linear_sum_assignment(cost)[1])
    watch(clock)
    run = clock.timed("seconds", weights.weight_matching)
    began = time.process_time()
    result = run(spec, models, key=jax.random.key(1), solver=lap if solver == "scipy" else solver)
    clock.seconds["cpu_seconds"] = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    size = sum(leaf.nbytes for model in models for leaf in jax.tree.leaves(model)) / GIB
    row = {**clock.seconds, "peak_gib": peak, "models_gib": size, "recovered": recovered(spec, result.plan)}
    row |= {"sweeps": result.info.sweeps.tolist(), "converged": bool(result.info.converged.all())}
    return row | floor(spec, len(models), row.get("lap", row["assignment"]))


def recovered(spec: PermutationSpec, plan) -> float:
    """The share of units, of all groups of all models, that are where they were planted."""
    hits = [
        (plan.permutations(model)[group] == rows).ravel()
        for model in range(1, plan.models)
        for group, rows in invert(spec, planted(spec, model)).items()
    ]
    return float(np.concatenate(hits).mean())


def operations(spec: PermutationSpec) -> Iterator[int]:
    """Multiplications and additions of the Gram matrices of one sweep over one model."""
    known = problem.structure(spec, tuple(leaf.name for leaf in spec.leaves if leaf.role == "weight"))
    for terms in known.terms.values():
        for term in terms:
            yield 2 * term.size * prod(known.blocks[term.block].shape[i] for i in term.free)


def floor(spec: PermutationSpec, count: int, lap: float) -> dict:
    """Two sweeps over every model but the anchor at the rate of a plain product, and the assignments."""
    x, y = np.random.default_rng(0).standard_normal((2, 4096, 2048), np.float32)
    clock = Clock()
    for _ in range(3):
        clock.timed("product", lambda: x @ y.T)()
    rate = 3 * 2 * 4096**2 * 2048 / clock.seconds["product"]
    total = 2 * (count - 1) * sum(operations(spec))
    return {"teraflop": total / 1e12, "gigaflops": rate / 1e9, "floor": total / rate + lap}


# the driver


def fresh(threads: int, *task: object) -> dict:
    """Run one task in a new process with pinned threads."""
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, env={**os.environ, **pinned, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"task {task} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure(case: str, args: argparse.Namespace) -> dict:
    config = CASES[case](args.scale)
    if case != "llama_1b":
        return rated(fresh(args.threads, "match", config, 2, args.noise, args.solver, []))
    with tempfile.TemporaryDirectory() as root:
        folders = [str(Path(root, str(model))) for model in range(2)]
        for model, folder in enumerate(folders):
            Path(folder).mkdir()
            fresh(args.threads, "write", config, folder, model, args.noise)
        return rated(fresh(args.threads, "match", config, 2, args.noise, args.solver, folders))


def rated(row: dict) -> dict:
    return row | {"over_floor": row["seconds"] / row["floor"]}


def growth(case: str, args: argparse.Namespace) -> dict:
    """Seconds at growing width or number of models, and the slope of their logarithms."""
    if case == "width":
        sizes = [width // args.scale for width in WIDTHS]
        runs = [(perceptron(width), 2) for width in sizes]
    else:
        sizes = [count - 1 for count in COUNTS]
        runs = [(perceptron(512 // args.scale), count) for count in COUNTS]
    rows = [fresh(args.threads, "match", config, count, args.noise, args.solver, []) for config, count in runs]
    seconds = [row["seconds"] for row in rows]
    slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
    return {"sizes": sizes, "all_seconds": seconds, "exponent": slope, "recovered": min(r["recovered"] for r in rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*CASES, "width", "models")
    parser.add_argument("--cases", nargs="+", choices=every, default=every)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation, in units of the weights'")
    parser.add_argument("--solver", default="scipy")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        name, *rest = args.task
        print(json.dumps(globals()[name](*rest)))
        return
    rows = []
    for case in args.cases:
        found = measure(case, args) if case in CASES else growth(case, args)
        rows.append({"case": case, "scale": args.scale, "noise": args.noise, "solver": args.solver, **found})
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, indent=1))
    setting = {name: version(name) for name in ("jax", "numpy", "scipy")}
    setting |= {"python": platform.python_version(), "cores": os.cpu_count(), "threads": args.threads}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
