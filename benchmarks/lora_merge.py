"""Merging LoRA adapters from disk to disk, against PEFT.

    python benchmarks/lora_merge.py
    python benchmarks/lora_merge.py --layers 2 --size 512 --methods lora_lego --no-peft      # a quick look

4 adapters of rank 16 (bfloat16, q, k, v and o of 32 layers, 4096 x 4096) are written as PEFT folders: noisy copies of
one adapter with its ranks in random order, so that there is something to be found. Then, each in a process of its own
with pinned threads:

- `permjax`: the whole command `permjax lora merge`, quality report included. `cold` is its first run (imports and
  compilation included), `warm` a second one in the same process. Seconds on the clock, seconds of the processor on all
  threads, largest memory of the process.
- `peft`: `add_weighted_adapter` on a base model of one such module, in float32; processor seconds times the number of
  modules. The adapters are loaded before the clock starts. Reading and writing files is not counted there, and the base
  model of the whole, which PEFT needs in memory, is not built.

`speedup` is the processor time of PEFT's `svd` over that of permjax (cold) for the whole set.
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
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "lora_merge.json"
METHODS = ("lora_lego", "lego_balanced", "truncate", "concat", "linear", "ties", "knots", "core_space", "tsv", "ctm")
PEFT_METHODS = ("svd", "ties_svd", "cat", "linear", "ties")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NOISE, DENSITY = 0.5, 0.2
GIB = 1 << 30


def write_adapters(folder: Path, args: argparse.Namespace) -> list[Path]:
    """Write the adapters as PEFT folders."""
    from permjax.lora.formats import save_adapter
    from permjax.lora.pool import Factors

    draw = np.random.default_rng(0)
    shape = (args.rank, args.size)
    found: list[dict[str, Factors]] = [{} for _ in range(args.adapters)]
    for layer in range(args.layers):
        for projection in PROJECTIONS:
            shared = [draw.standard_normal(shape, np.float32) / np.sqrt(args.size) for _ in "ab"]
            for adapter in found:
                order = draw.permutation(args.rank)
                own = [x + NOISE * draw.standard_normal(shape, np.float32) / np.sqrt(args.size) for x in shared]
                name = f"model.layers.{layer}.self_attn.{projection}"
                adapter[name] = Factors(own[0][order], own[1][order].T)
    paths = [folder / f"adapter_{number}" for number in range(args.adapters)]
    for path, adapter in zip(paths, found, strict=True):
        save_adapter(path, adapter, like=(), style="peft", dtype="bfloat16")
    return paths


def spent() -> tuple[float, float]:
    """Seconds on the clock, and seconds of the processor of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def measure_permjax(method: str, paths: list[str], out: str, begin: float) -> dict[str, Any]:
    """Run the command twice; the first run counts from the start of the process."""
    from permjax.cli import main

    def run(number: int, rank: list[str]) -> None:
        command = [
            "lora",
            "merge",
            *paths,
            "-o",
            f"{out}/{method}_{number}",
            "--method",
            method,
            *rank,
            "--no-progress",
        ]
        if status := main(command):
            raise SystemExit(status)

    rank = [] if method == "concat" else ["--rank", "16"]
    run(0, rank)
    wall, busy = spent()
    cold = {"seconds": time.time() - begin, "processor": busy}
    run(1, rank)
    warm = [after - before for after, before in zip(spent(), (wall, busy), strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return {"cold": cold, "warm": dict(zip(("seconds", "processor"), warm, strict=True)), "peak_gib": peak}


def measure_peft(method: str, args: argparse.Namespace) -> dict[str, Any]:
    """Merge one module of the same sizes with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    base = torch.nn.Sequential(torch.nn.Linear(args.size, args.size, bias=False))
    config = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=["0"], init_lora_weights=False)
    names = [f"adapter_{number}" for number in range(args.adapters)]
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    options = {"density": DENSITY} if "ties" in method else {}
    options |= {"svd_rank": args.rank} if "svd" in method else {}
    times = []
    for number in range(1 if "svd" in method else 3):
        before = spent()[1]
        model.add_weighted_adapter(names, [1 / len(names)] * len(names), f"merged_{number}", method, **options)
        times.append(spent()[1] - before)
    return {"processor_of_one_module": median(times)}


def fresh(args: argparse.Namespace, *job: str) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    threads = str(args.threads)
    pins = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(pins, threads), "JAX_PLATFORMS": "cpu"}
    settings = [f"--{name}={getattr(args, name)}" for name in ("layers", "size", "rank", "adapters", "threads")]
    command = [sys.executable, __file__, *settings, "--job", *job, str(time.time())]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def whole(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all methods, and PEFT's where it is wanted."""
    modules = args.layers * len(PROJECTIONS)
    rows: dict[str, Any] = {"permjax": {}, "peft": {}}
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for path in write_adapters(Path(folder), args)]
        for method in args.methods:
            rows["permjax"][method] = fresh(args, "permjax", method, folder, *paths)
            print(method, json.dumps(rows["permjax"][method]), flush=True)
    for method in PEFT_METHODS if args.peft else ():
        row = fresh(args, "peft", method)
        rows["peft"][method] = {**row, "processor_of_all": modules * row["processor_of_one_module"]}
        print("peft", method, json.dumps(rows["peft"][method]), flush=True)
    if args.peft:
        slow = rows["peft"]["svd"]["processor_of_all"]
        rows["speedup"] = {m: slow / row["cold"]["processor"] for m, row in rows["permjax"].items()}
        rows["speedup_warm"] = {m: slow / row["warm"]["processor"] for m, row in rows["permjax"].items()}
    return rows


def rounded(row: Any) -> Any:
    if isinstance(row, dict):
        return {name: rounded(value) for name, value in row.items()}
    return float(f"{row:.4g}") if isinstance(row, float) else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (("layers", 32), ("size", 4096), ("rank", 16), ("adapters", 4), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        kind, method, *rest = args.job
        begin = float(rest[-1])
        found = measure_permjax(method, rest[1:-1], rest[0], begin) if kind == "permjax" else measure_peft(method, args)
        print(json.dumps(found))
        return
    setting = {name: getattr(args, name) for name in ("layers", "size", "rank", "adapters", "threads")}
    packages = ("jax", "jaxlib", "numpy", *(("torch", "peft") if args.peft else ()))
    setting |= {"machine": platform.machine(), "cores": os.cpu_count()}
    setting |= {"versions": {name: version(name) for name in packages}}
    rows = rounded(whole(args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, **rows}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
