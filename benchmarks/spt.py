"""Permuting semantic units on the device, against a loop in NumPy, and as a share of a training step.

    python benchmarks/spt.py
    python benchmarks/spt.py --repeats 5 --shapes 64x128     # a quick look

Times are seconds of processor time (a busy machine does not stretch them), medians; compilation is apart. Reported:

- permutation: million tokens per second of `permute_units`, compiled, with three arrays by token, against a loop over
  documents in NumPy, as a collator would do it, with the same three. Rows are packed with documents of 20 to 65 tokens
  in units of 1 to 5.
- share: its time over that of a step of training (GPT-2 of two layers and width 128; gradient and AdamW) on the same
  batch, for rows of at most 512 tokens.
- devices: losses of five steps with permutation on one and on eight virtual devices.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from permjax.nets.gpt import GPT2Config, build
from permjax.reversal.interfaces import wrap_step
from permjax.reversal.layout import next_token, visible
from permjax.reversal.packing import pack
from permjax.reversal.reorder import THIRDS, permute_units

RESULT = Path(__file__).parent / "results" / "spt.json"
PINNED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"
}
AIMS = {"times_numpy": 7.0, "share_of_step": 0.01}
DEVICES, VOCABULARY = 8, 1000
LONGEST = 512  # rows of steps, which have attention matrices


def draw(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    documents: list[dict[str, np.ndarray]] = []
    while True:
        n = int(rng.integers(20, 66))
        units = np.repeat(np.arange(n), rng.integers(1, 6, n))[:n]
        tokens = rng.integers(0, VOCABULARY, n).astype(np.int32)
        documents.append({"tokens": tokens, "unit_ids": units, "loss_mask": np.ones(n, bool)})
        if sum(len(document["tokens"]) for document in documents) > rows * length * 0.99:
            packed = pack(documents, length)
            return {name: leaf[:rows] for name, leaf in packed.items()}


def permute_in_numpy(rng: np.random.Generator, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a collator would do: go over the documents of each row, and move their units."""
    names = ("tokens", "unit_ids", "loss_mask")
    out = {name: batch[name].copy() for name in names}
    for row, doc_ids in enumerate(batch["doc_ids"]):
        for document in range(doc_ids.max() + 1):
            (here,) = np.nonzero(doc_ids == document)
            cuts = np.nonzero(np.diff(batch["unit_ids"][row, here]))[0] + 1
            units = np.split(here, cuts)
            order = rng.choice(3, p=THIRDS)
            if order == 1:
                units = units[::-1]
            elif order == 2:
                units = [units[unit] for unit in rng.permutation(len(units))]
            index = np.concatenate(units)
            for name in names:
                out[name][row, here] = batch[name][row, index]
    return out


def seconds(function: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        begin = process_time()
        jax.block_until_ready(function())
        times.append(process_time() - begin)
    return median(times)


def in_turn(sides: tuple[Callable[[], Any], ...], repeats: int) -> list[float]:
    """Medians over rounds in which every side runs for a while, so that all meet the same machine."""
    rounds = [[seconds(side, 3) for side in sides] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds, strict=True)]


def on_device(batch: dict[str, np.ndarray]) -> tuple[dict[str, jax.Array], int]:
    most = int(batch["unit_ids"].max()) + 1
    return jax.tree.map(jnp.asarray, batch), -(-most // 8) * 8


def measure_permutation(rows: int, length: int, repeats: int) -> tuple[dict[str, Any], float]:
    batch = draw(rows, length)
    device, most = on_device(batch)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    permute = jax.jit(lambda key, batch: permute_units(key, batch, max_units=most))
    sides = (lambda: permute(key, device), lambda: permute_in_numpy(rng, batch))
    ours, theirs = in_turn(sides, repeats)
    tokens = int((batch["doc_ids"] >= 0).sum())
    row = {
        "shape": f"{rows}x{length}",
        "documents": int(batch["doc_ids"].max(axis=1).sum() + rows),
        "most_units": most,
        "million_tokens_per_second": tokens / ours / 1e6,
        "numpy_million_tokens_per_second": tokens / theirs / 1e6,
        "times_numpy": theirs / ours,
    }
    return row, ours


def make_step(length: int) -> tuple[Any, Callable[..., Any]]:
    """The state of a small GPT-2, and a step on a prepared batch."""
    net = build(GPT2Config(VOCABULARY, n_positions=length, n_embd=128, n_layer=2, n_head=4))
    optimizer = optax.adamw(3e-3)
    params = net.init(jax.random.key(0))

    def loss(params: Any, batch: dict[str, Any]) -> jax.Array:
        logits = net.apply(params, batch["tokens"], positions=batch["positions"], visible=visible(batch["doc_ids"]))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return (each * batch["weights"]).sum() / batch["weights"].sum()

    def step(state: Any, batch: dict[str, Any]) -> tuple[Any, jax.Array]:
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return (params, optimizer.init(params)), step


def measure_step(rows: int, length: int, repeats: int) -> float:
    state, step = make_step(length)
    batch = next_token(on_device(draw(rows, length))[0])
    compiled = jax.jit(step)
    return seconds(lambda: compiled(state, batch), max(2, repeats // 4))


def measure_devices() -> dict[str, Any]:
    batch, most = on_device(draw(16, 64))
    mesh = jax.make_mesh((DEVICES,), ("rows",), axis_types=(AxisType.Auto,))
    shared = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("rows")))
    losses = {}
    for name, given in (("1", batch), (str(DEVICES), shared)):
        state, step = make_step(64)
        run = jax.jit(wrap_step(step, jax.random.key(1), max_units=most, prepare=next_token))
        losses[name] = []
        for epoch in range(5):
            state, value = run(state, given, epoch)
            losses[name].append(float(value))
    one, many = (np.array(values) for values in losses.values())
    return {"losses": losses, "largest_relative_difference": float(np.abs(many / one - 1).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["64x128", "16x512", "8x2048"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--step", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--devices-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.devices_only:
        jax.config.update("jax_num_cpu_devices", DEVICES)
        print(json.dumps(measure_devices()))
        return
    os.environ.update(PINNED)
    rows = []
    for shape in args.shapes:
        size, length = map(int, shape.split("x"))
        row, ours = measure_permutation(size, length, args.repeats)
        if args.step and length <= LONGEST:
            row["share_of_step"] = ours / measure_step(size, length, args.repeats)
        rows.append({name: round(x, 5) if isinstance(x, float) else x for name, x in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    setting = {"machine": platform.machine(), "cores": os.cpu_count(), "repeats": args.repeats, "aims": AIMS}
    setting |= {"versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")}}
    job = subprocess.run([sys.executable, __file__, "--devices-only"], check=True, capture_output=True, text=True)
    devices = json.loads(job.stdout.splitlines()[-1])
    print(json.dumps(devices))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "rows": rows, "devices": devices}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
