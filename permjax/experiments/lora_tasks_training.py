"""Base models that know some words, and an adapter for every word that they do not know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from permjax import tree
from permjax.experiments.lora_tasks_data import Examples, Language
from permjax.lora.pool import Adapter, Factors, padded
from permjax.nets.base import Net
from permjax.nets.gpt import GPT2Config
from permjax.nets.registry import build
from permjax.train import TrainConfig, cross_entropy, make_optimizer, train

_LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class SizeConfig:
    """The size of the base models.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        heads: number of heads.
        hidden: width of a block's MLP; three times the width gives modules of the fewest shapes.
    """

    layers: int = 2
    width: int = 64
    heads: int = 4
    hidden: int = 192


@dataclass(frozen=True)
class AdapterTraining:
    """How every adapter is trained; the base model stays as it is.

    Attributes:
        examples: of its task and of the words that it is to leave alone.
        replayed: the share of the latter; without them, updates act on all words alike.
        steps: of Adam, whose rate falls to zero along a cosine.
        batch_size: examples per step.
        learning_rate: at the beginning.
    """

    examples: int = 4000
    replayed: float = 0.5
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 5e-3


class Model(NamedTuple):
    """A base model: its network, which answers a question with logits `[batch, vocabulary]`, and its weights."""

    net: Net
    params: Any


# base models


def network(language: Language, size: SizeConfig) -> Net:
    """The network of a size that reads a language and answers with the logits at the last token."""
    shape = (size.width, size.layers, size.heads, size.hidden)
    return _answering(build(GPT2Config(language.vocabulary, language.tokens, *shape)))


@cache
def _answering(net: Net) -> Net:
    def apply(params: Any, x: Array) -> Array:
        return net.apply(params, x)[:, -1]

    return net._replace(apply=apply, apply_train=lambda params, x: (apply(params, x), params))


def train_bases(
    net: Net, data: Examples, test: Examples, config: TrainConfig, seeds: Sequence[int], out: Path, progress: Any
) -> list[Model]:
    """Train one base model per seed, all at once."""
    progress.start(f"training {len(seeds)} base models", config.epochs)

    def tell(_: int, scores: Mapping[str, np.ndarray]) -> None:
        progress.step(1, **{name: float(np.mean(values)) for name, values in scores.items()})

    arrays = (data.x, data.y, test.x, test.y)
    result = train(net, arrays, config, seeds, checkpoint_dir=out / "state", progress=tell)
    progress.done()
    return [Model(net, params) for params in tree.unstack(result.params)]


# adapters


def modules(net: Net) -> list[str]:
    """The names of the modules that get an update: the matrices of attention and MLPs."""
    return [f"h.{i}.{layer}" for i in range(net.config.n_layer) for layer in _LAYERS]


def adapted(base: Any, adapter: Mapping[str, Factors], scale: Any = 1.0) -> Any:
    """The weights of a base model with an adapter's updates, `W + scale (b a)^T`, as kernels are `[in, out]`."""
    updated = {f"{name}.weight": base[f"{name}.weight"] + scale * (f.a.T @ f.b.T) for name, f in adapter.items()}
    return {**base, **updated}


def train_adapters(
    model: Model, tasks: Sequence[Examples], ranks: Sequence[int], config: AdapterTraining, key: Any
) -> list[Adapter]:
    """Train an adapter of each rank on each task, all at once.

    They are filled up with zeros to one rank, which stay zero: the gradient of a row of a is zero where its column of b
    is, and the other way round.
    """
    rank = max(ranks)
    keys = jax.random.split(key, len(ranks))
    start = [_start(model, size, rank, one) for size, one in zip(ranks, keys, strict=True)]
    x, y = (jnp.stack([jnp.asarray(part) for part in parts]) for parts in zip(*tasks, strict=True))
    trained = _program(model.net, config)(model.params, tree.stack(start), x, y, keys)
    parts = tree.unstack(jax.device_get(trained))
    return [_cut(one, size) for one, size in zip(parts, ranks, strict=True)]


def _start(model: Model, size: int, rank: int, key: Any) -> dict[str, Factors]:
    """Random a and zero b of a rank, filled up."""
    found = {}
    for number, name in enumerate(modules(model.net)):
        inputs, outputs = model.params[f"{name}.weight"].shape
        a = jax.random.normal(jax.random.fold_in(key, number), (size, inputs)) / np.sqrt(inputs)
        found[name] = padded(a, jnp.zeros((outputs, size)), rank)
    return found


def _cut(adapter: Mapping[str, Factors], rank: int) -> dict[str, Factors]:
    return {name: Factors(f.a[:rank], f.b[:, :rank]) for name, f in adapter.items()}


@cache
def _program(net: Net, config: AdapterTraining) -> Callable[..., Any]:
    """The compiled training of one adapter per task; kept, so that other seeds do not compile it again."""
    optimizer = make_optimizer(TrainConfig(1, learning_rate=config.learning_rate, schedule="cosine"), config.steps)

    def step(base: Any, x: Array, y: Array, state: Any, key: Any) -> tuple[Any, None]:
        adapter, moments = state
        rows = jax.random.randint(key, (config.batch_size,), 0, len(x))
        gradient = jax.grad(lambda one: cross_entropy(net.apply(adapted(base, one), x[rows]), y[rows]))(adapter)
        updates, moments = optimizer.update(gradient, moments, adapter)
        return (optax.apply_updates(adapter, updates), moments), None

    def one(base: Any, adapter: Any, x: Array, y: Array, key: Any) -> Any:
        keys = jax.random.split(key, config.steps)
        return jax.lax.scan(partial(step, base, x, y), (adapter, optimizer.init(adapter)), keys)[0][0]

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)))
