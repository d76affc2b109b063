"""Facts written per second against ROME in eager PyTorch, many candidates beside one model, and perplexity.

    taskset -c 0 python benchmarks/editing.py
    python benchmarks/editing.py --repeats 2 --candidates 8     # a quick look

A random GPT-2 (4 layers, width 64, 1,411 tokens), the same weights in transformers. Times are seconds of processor time
(a busy machine does not stretch them), medians of rounds in which both sides run in turn, on one thread; compilation is
apart. Reported:

- edit: ROME with 7 rows and all of its 20 forward passes, from prepared tokens to the change of rank one, and the same
  in eager PyTorch, written here with hooks.
- candidates: ROME edits of one model, each by itself; then the losses of 32 sentences in all of these models, beside
  the one model (compiled, no copies) and in one changed model after the other. Memory is what the compiled program
  needs beside its arguments, and the size of the copies that it does without.
- perplexity: sentences per second, by `sentence_mean`, and by a loop over the same batches in PyTorch.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import jax
import numpy as np
import torch
import transformers

from permjax.edit.apply import edit_independent
from permjax.edit.base import Statistics
from permjax.edit.covariance import Covariance, fingerprint
from permjax.edit.delta import apply_delta, side_path
from permjax.edit.prepare import PreparedEdit
from permjax.edit.rome import Rome
from permjax.edit.values import ValueSettings
from permjax.merge.perplexity import Sentences, candidate_losses, group_losses, padded, perplexity_of
from permjax.nets.registry import build, config_from_dict

PINNED = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "JAX_PLATFORMS": "cpu",
}
RESULT = Path(__file__).parent / "results" / "editing.json"
AIMS = {"times_pytorch": 10.0}
SIZES = {"vocab_size": 1411, "n_positions": 24, "n_embd": 64, "n_layer": 4, "n_head": 4}
LAYER, ROWS, PROMPT, BEHIND, ANSWER, LENGTH, SENTENCES = 1, 7, 6, 3, 1, 16, 32
SETTINGS = ValueSettings(weight_decay=1e-3, stop=0.0)  # so that all forward passes are made


def make_models() -> tuple[Any, Any, dict[str, jax.Array]]:
    """The model of transformers, and our network with the same weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(5)
    net = build(config_from_dict(config.to_dict() | {"prefix": "transformer."}))
    names = jax.eval_shape(net.init, jax.random.key(0))
    return model, net, {name: jax.numpy.asarray(model.state_dict()[name].numpy()) for name in names}


def random_edit(seed: int) -> PreparedEdit:
    """A prompt with its subject before its last three tokens; every row but the first has a prefix of six tokens."""
    rng = np.random.default_rng(seed)
    prompt, answer = rng.integers(1, SIZES["vocab_size"], PROMPT), rng.integers(1, SIZES["vocab_size"], ANSWER)
    rows = [np.concatenate([rng.integers(1, 1411, 6 if row else 0), prompt, answer]) for row in range(ROWS)]
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.stack([np.pad(row, (0, LENGTH - len(row))) for row in rows]).astype(np.int32)
    targets = np.full((ROWS, LENGTH), -1, np.int32)
    for row, length in enumerate(lengths):
        targets[row, length - ANSWER - 1 : length - 1] = answer
    essence = np.pad(rng.integers(1, 1411, 4), (0, LENGTH - 4)).astype(np.int32)
    return PreparedEdit(
        tokens, lengths - np.int32(BEHIND + ANSWER + 1), targets, lengths, essence, np.asarray(1, np.int32)
    )


def eager_rome(model: Any, edit: PreparedEdit, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u and v of ROME, step by step: a hook, Adam, no fixed shapes; and the covariance factorised before."""
    matrix = model.transformer.h[LAYER].mlp.c_proj
    tokens = torch.tensor(np.concatenate([edit.tokens, edit.kl_tokens[None]]), dtype=torch.long)
    subject = torch.tensor(np.append(edit.subject, edit.kl_subject), dtype=torch.long)
    rows, (row, at) = torch.arange(ROWS + 1), np.nonzero(edit.targets >= 0)
    wanted = torch.tensor(edit.targets[row, at], dtype=torch.long)
    delta, seen = torch.zeros(SIZES["n_embd"], requires_grad=True), {}

    def hook(_: Any, inputs: Any, output: Any) -> Any:
        seen.update(key=inputs[0].detach(), value=output.detach())
        output = output.clone()
        output[rows, subject] += delta
        return output

    def loss() -> Any:
        logs = torch.log_softmax(model(tokens).logits, -1)
        new = logs[-1, subject[-1]]
        old = seen.setdefault("old", new.detach())
        start = seen.setdefault("start", seen["value"][0, subject[0]])
        divergence = torch.nn.functional.kl_div(old, new, log_target=True, reduction="sum")
        decay = SETTINGS.weight_decay * delta.norm() / start.norm() ** 2
        return -logs[row, at, wanted].sum() / (ROWS * ANSWER) + SETTINGS.kl * divergence + decay

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handle, adam = matrix.register_forward_hook(hook), torch.optim.Adam([delta], lr=SETTINGS.learning_rate)
    for step in range(SETTINGS.steps):
        adam.zero_grad()
        value = loss()
        if step < SETTINGS.steps - 1:
            value.backward()
            adam.step()
            with torch.no_grad():
                delta *= min(1.0, (SETTINGS.clamp * seen["start"].norm() / delta.norm()).item())
    handle.remove()
    keys = seen["key"][rows, subject][:ROWS].double().numpy()
    u = np.linalg.solve(covariance, keys.mean(axis=0))
    u /= np.linalg.norm(u)
    return delta.detach().double().numpy() / (keys[0] @ u), u


def in_turn(sides: tuple[Callable[[], Any], ...], repeats: int) -> list[float]:
    """Medians of processor time over rounds in which every side runs once, after a first run of each."""
    for side in sides:
        jax.block_until_ready(side())
    rounds = []
    for _ in range(repeats):
        times = []
        for side in sides:
            begin = process_time()
            jax.block_until_ready(side())
            times.append(process_time() - begin)
        rounds.append(times)
    return [median(times) for times in zip(*rounds, strict=True)]


def statistics_of(net: Any, params: Any) -> Statistics:
    """Second moments with eigenvalues over a decade."""
    size = 4 * SIZES["n_embd"]
    half = np.random.default_rng(2).standard_normal((size, 4 * size)) * np.logspace(-0.5, 0, size)[:, None]
    covariance = Covariance(half @ half.T / (4 * size), 4 * size, LAYER, fingerprint(params))
    return Statistics.of(net, params, {LAYER: covariance})


def measure_edit(model: Any, net: Any, params: Any, repeats: int) -> dict[str, Any]:
    statistics, edit, editor = statistics_of(net, params), random_edit(0), Rome(LAYER, value=SETTINGS)
    matrix = statistics.matrix(LAYER)
    begin = perf_counter()
    (change,) = editor(net, params, [edit], covariances=statistics).delta.values()
    compiled = perf_counter() - begin
    value, key = eager_rome(model, edit, matrix)
    mine, theirs = change.u @ change.v.T, np.outer(value, key)
    sides = (
        lambda: editor(net, params, [edit], covariances=statistics).info.norm,
        lambda: eager_rome(model, edit, matrix)[0],
    )
    ours, eager = in_turn(sides, repeats)
    return {
        "seconds_per_edit": ours,
        "pytorch_seconds_per_edit": eager,
        "times_pytorch": eager / ours,
        "first_call_seconds": compiled,
        "largest_relative_difference": float(np.abs(mine - theirs).max() / np.abs(theirs).max()),
    }


def sentences(count: int) -> tuple[Sentences, ...]:
    rng = np.random.default_rng(1)
    return padded((rng.integers(1, 1411, rng.integers(9, 17)).tolist() for _ in range(count)), rows=16)


def measure_candidates(net: Any, params: Any, count: int, repeats: int) -> dict[str, Any]:
    edits, editor = [random_edit(n) for n in range(count)], Rome(LAYER, value=SETTINGS)
    statistics = statistics_of(net, params)
    sweep = partial(edit_independent, editor, net, params, edits, covariances=statistics)
    (solved,) = in_turn((lambda: sweep().infos[0].norm,), max(1, repeats // 4))
    deltas = sweep().deltas
    stack = jax.tree.map(lambda *parts: np.stack(parts).astype(np.float32), *deltas)
    probe = sentences(SENTENCES)

    def beside(params: Any, delta: Any, tokens: Any) -> Any:
        return net.apply(params, tokens, hook=side_path(net, delta))

    def looped() -> list[Any]:
        return [group_losses(net.apply, apply_delta(params, delta), {"": probe}) for delta in deltas]

    sides = (lambda: [candidate_losses(beside, params, stack, batch) for batch in probe], looped)
    ours, one_by_one = in_turn(sides, repeats)
    needed = candidate_losses.lower(beside, params, stack, probe[0]).compile().memory_analysis().temp_size_in_bytes
    whole = sum(leaf.nbytes for leaf in params.values())
    return {
        "candidates": count,
        "seconds_per_edit": solved / count,
        "losses_seconds": ours,
        "losses_seconds_one_by_one": one_by_one,
        "megabytes_needed": needed / 1e6,
        "megabytes_of_copies": count * whole / 1e6,
    }


def measure_perplexity(model: Any, net: Any, params: Any, repeats: int) -> dict[str, Any]:
    probe = sentences(20 * SENTENCES)

    def ours() -> Any:
        return perplexity_of(group_losses(net.apply, params, {"": probe})[""])

    def theirs() -> float:
        found = []
        with torch.no_grad():
            for tokens, mask in probe:
                ids, kept = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask)
                logs = torch.log_softmax(model(ids, attention_mask=kept.long()).logits[:, :-1], -1)
                each = -logs.gather(-1, ids[:, 1:, None])[..., 0] * kept[:, 1:]
                counts = kept[:, 1:].sum(-1)
                found.append(torch.exp(each.sum(-1) / counts)[counts > 0])
        return float(torch.cat(found).mean())

    mine, eager = in_turn((ours, theirs), repeats)
    count = 20 * SENTENCES
    return {
        "sentences": count,
        "sentences_per_second": count / mine,
        "pytorch_sentences_per_second": count / eager,
        "relative_difference": abs(float(ours()) / theirs() - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if any(os.environ.get(name) != setting for name, setting in PINNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PINNED})
    torch.set_num_threads(1)
    model, net, params = make_models()
    setting = {"machine": platform.machine(), "cores": os.cpu_count(), "repeats": args.repeats, "aims": AIMS}
    setting |= {"versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "torch", "transformers")}}
    found: dict[str, Any] = {"setting": setting}
    for name, measure in (
        ("edit", lambda: measure_edit(model, net, params, args.repeats)),
        ("candidates", lambda: measure_candidates(net, params, args.candidates, args.repeats)),
        ("perplexity", lambda: measure_perplexity(model, net, params, args.repeats)),
    ):
        found[name] = {key: round(x, 7) if isinstance(x, float) else x for key, x in measure().items()}
        print(json.dumps({name: found[name]}), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
