"""How many units of a transformer weight matching finds again, by kind of group and noise.

    python benchmarks/attention_recovery.py --seeds 10

For every architecture the spec is traced, every group of it is permuted at random (the insides of each head on their
own: queries and keys apart from values and outputs), noise is added to every leaf, and weight matching has to undo
the permutation. Noise is relative: its standard deviation over that of the leaf. Models have random weights, or were
trained briefly. Reported for each noise and kind of group: the mean share of units found, over seeds, and the share
of seeds in which all were found. With grouped queries, no query head may ever leave its group.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from permjax import tree
from permjax.action import permute
from permjax.data.registry import load
from permjax.match.weights import weight_matching
from permjax.nets.base import Net
from permjax.nets.registry import build, config_from_dict
from permjax.permutation import invert, random_permutations
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.train import TrainConfig, train

RESULT = Path(__file__).parent / "results" / "attention_recovery.json"
NOISES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0)
CASES = {
    "gpt2": {"model_type": "gpt2", "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "llama": {
        "model_type": "llama", "max_position_embeddings": 32, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "vit": {"model_type": "vit", "input_shape": [8, 8], "patch": 2, "width": 48, "depth": 3, "heads": 4, "mlp": 96},
}  # fmt: skip
KINDS = ("residual", "heads", "kv groups", "query heads", "qk", "vo", "hidden")
OUTPUTS = ("c_proj", "o_proj", "out")


class Recovery(NamedTuple):
    """Units in their place by kind, and whether every query head stayed in its group."""

    shares: dict[str, float]
    unmixed: bool


def prepare(case: str) -> tuple[Net, PermutationSpec, Any]:
    """The network with its spec, and the data on which it may be trained."""
    data = load("digits") if case == "vit" else load("sentences", length=32, characters=100_000)
    vocabulary = {} if case == "vit" else {"vocab_size": len(data.classes)}
    net = build(config_from_dict(CASES[case] | vocabulary))
    like = jax.eval_shape(net.init, jax.random.key(0))
    return net, trace_spec(net.apply, like, *net.example_inputs(1)), data


def random_model(net: Net, seed: int) -> dict[str, Any]:
    """Weights of which every leaf is normal noise, so that each one counts."""
    draw = np.random.default_rng(seed)
    like = jax.eval_shape(net.init, jax.random.key(0))
    return tree.map_named(lambda _, leaf: draw.standard_normal(leaf.shape, np.float32), like)


def trained_models(net: Net, data: Any, seeds: range, epochs: int) -> list[Any]:
    config = TrainConfig(epochs=epochs, batch_size=32, learning_rate=2e-3, optimizer="adamw")
    return list(tree.unstack(jax.device_get(train(net, data, config, list(seeds)).params)))


def kind_of(spec: PermutationSpec, group: str) -> str:
    """What the units of a group are, from where it stands."""
    leaves = [member.leaf for member in spec.members(group)]
    if spec.group(group).per:
        if not any(name in leaf.replace("/", ".").split(".") for leaf in leaves for name in OUTPUTS):
            return "qk"
        return "query heads" if any("q_proj" in leaf for leaf in leaves) else "vo"
    if inside := [g.name for g in spec.groups if group in g.per]:
        return "kv groups" if any(kind_of(spec, name) == "query heads" for name in inside) else "heads"
    most = max(len(spec.members(g.name)) for g in spec.groups)
    return "residual" if len(leaves) == most else "hidden"


def recover(spec: PermutationSpec, model: Any, noise: float, seed: int) -> Recovery:
    """Plant a permutation and noise, match, and count."""
    key, draw = jax.random.key(seed), np.random.default_rng([1, seed])  # not the draw of `random_model`
    planted = {g: np.asarray(p) for g, p in random_permutations(spec, key).items()}

    def disturb(_: str, leaf: np.ndarray) -> np.ndarray:
        return leaf + np.float32(noise * leaf.std()) * draw.standard_normal(leaf.shape, np.float32)

    copy = permute(spec, planted, tree.map_named(disturb, model))
    plan = weight_matching(spec, [model, copy], key=key).plan
    assert plan is not None
    found = plan.permutations(1)
    right, counts = invert(spec, planted), {}
    for g in spec.groups:
        counts.setdefault(kind_of(spec, g.name), []).append((right[g.name] == found[g.name]).ravel())
    shares = {kind: float(np.concatenate(same).mean()) for kind, same in counts.items()}
    return Recovery(shares, all(unmixed(*heads) for heads in query_heads(spec, found)))


def query_heads(spec: PermutationSpec, found: dict[str, np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the permutation of all query heads of a layer, numbered throughout, and the size of a group of them."""
    for g in spec.groups:
        if kind_of(spec, g.name) == "query heads":
            kv = found[g.per[-1]]
            yield (kv[:, None] * g.size + found[g.name]).ravel(), g.size


def unmixed(heads: np.ndarray, size: int) -> bool:
    """Tell whether heads that share keys and values come from heads that do."""
    groups = heads.reshape(-1, size) // size
    return bool((groups == groups[:, :1]).all())


def measure(case: str, weights: str, spec: PermutationSpec, models: list[Any]) -> Iterator[dict]:
    for noise in NOISES:
        found = [recover(spec, model, noise, seed) for seed, model in enumerate(models)]
        kinds = [kind for kind in KINDS if kind in found[0].shares]
        yield {
            "case": case,
            "weights": weights,
            "noise": noise,
            "seeds": len(models),
            "recovered": {kind: float(np.mean([f.shares[kind] for f in found])) for kind in kinds},
            "complete": float(np.mean([min(f.shares.values()) == 1 for f in found])),
            "heads_mixed_across_kv_groups": sum(not f.unmixed for f in found),
        }


def rows(args: argparse.Namespace) -> Iterator[dict]:
    for case in args.cases:
        net, spec, data = prepare(case)
        yield from measure(case, "random", spec, [random_model(net, seed) for seed in range(args.seeds)])
        if args.epochs:
            models = trained_models(net, data, range(args.trained_seeds), args.epochs)
            yield from measure(case, f"trained for {args.epochs} epochs", spec, models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trained-seeds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="of the trained models; 0 leaves them out")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    found = []
    for row in rows(args):
        found.append(row)
        print(json.dumps(row))
    setting = {name: version(name) for name in ("jax", "numpy", "scipy")}
    setting |= {"python": platform.python_version(), "cores": os.cpu_count()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"setting": setting, "models": CASES, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
