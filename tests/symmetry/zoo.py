"""The models of the golden table: every row names what the tracer has to find.

A case is (apply, abstract params, inputs, expected groups, options); a group is (size, sizes of its `per` groups,
members or None).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from permjax.nets import registry


class Case(NamedTuple):
    apply: object
    params: object
    inputs: tuple
    groups: list
    options: dict


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def tokens(batch, length, vocabulary=17):
    return jnp.asarray(np.random.default_rng(0).integers(0, vocabulary, (batch, length)), jnp.int32)


def image(*sizes):
    return jnp.asarray(np.random.default_rng(0).normal(size=sizes), jnp.float32)


def of_linen(module, x, groups, **options):
    params = jax.eval_shape(module.init, jax.random.key(0), x)
    return Case(module.apply, params, (x,), groups, options)


def of_net(values, x, groups, **options):
    net = registry.build(registry.config_from_dict(values))
    return Case(net.apply, jax.eval_shape(net.init, jax.random.key(0)), (x,), groups, options)


def mlp():
    return of_net(
        {"model_type": "mlp", "input_shape": [6], "hidden": [32, 16]}, image(3, 6), [(32, (), 3), (16, (), 3)]
    )


def vgg():
    values = {
        "model_type": "vgg",
        "input_shape": [8, 8, 3],
        "layers": [8, "M", 12, "M"],
        "hidden": [16],
        "norm": "none",
    }
    return of_net(values, image(2, 8, 8, 3), [(8, (), 3), (12, (), 3), (16, (), 3)])


class SmallResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3))(x)))
        for features, stride in ((8, 1), (16, 2)):
            h = nn.relu(norm()(nn.Conv(features, (3, 3), stride)(x)))
            h = norm()(nn.Conv(features, (3, 3))(h))
            if stride > 1:
                x = norm()(nn.Conv(features, (1, 1), stride)(x))
            x = nn.relu(x + h)
        return nn.Dense(5)(x.mean((1, 2)))


def small_resnet():
    expected = [(8, (), 15), (8, (), None), (16, (), None), (16, (), 13)]
    return of_linen(SmallResNet(), image(2, 8, 8, 3), expected)


def resnet50():
    values = {
        "model_type": "resnet", "input_shape": [32, 32, 3], "channels": [4, 8, 16, 32], "blocks": [3, 4, 6, 3],
        "norm": "batch", "block": "bottleneck", "stem": "imagenet",
    }  # fmt: skip
    return of_net(values, image(1, 32, 32, 3), 37)


class GroupedConvs(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=8)(x))
        x = nn.relu(nn.Conv(12, (1, 1))(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=3)(x))
        return nn.Dense(4)(x.mean((1, 2)))


def grouped_convs():
    expected = [(8, (), None), (2, (8,), None), (3, (), None), (4, (3,), None), (4, (3,), None)]
    return of_linen(GroupedConvs(), image(2, 6, 6, 3), expected)


class GroupNormed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x))).mean((1, 2)))


def group_norm():
    return of_linen(GroupNormed(), image(2, 6, 6, 3), [(4, (), None), (4, (4,), None)])


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 5, 6):
            new = nn.relu(nn.Conv(features, (3, 3))(x))
            x = new if features == 8 else jnp.concatenate([x, new], -1)
        return nn.Dense(4)(x.mean((1, 2)))


def dense_net():
    return of_linen(DenseNet(), image(2, 6, 6, 3), [(8, (), None), (5, (), None), (6, (), None)])


def vit():
    values = {"model_type": "vit", "input_shape": [8, 8, 3], "patch": 4, "width": 24, "depth": 2, "heads": 4, "mlp": 48}
    layer = [(48, (), 3), (4, (), None), (6, (4,), None), (6, (4,), None)]
    return of_net(values, image(2, 8, 8, 3), [(24, (), 31), *layer, *layer])


def gpt2(layers=2, width=24, heads=4, x=None, dtype=None):
    values = {
        "model_type": "gpt2", "vocab_size": 17, "n_positions": 8, "n_embd": width, "n_layer": layers, "n_head": heads,
    }  # fmt: skip
    layer = [(4 * width, (), 3), (heads, (), 7), (width // heads, (heads,), None), (width // heads, (heads,), None)]
    return of_net(values, tokens(2, 5) if x is None else x, [(width, (), 4 + 10 * layers), *layer * layers])


def rope(x, rotated=None):
    """Half-split rotary positions on `[batch, tokens, ..., dim]`."""
    rotated = x.shape[-1] if rotated is None else rotated
    turn, rest = x[..., :rotated], x[..., rotated:]
    half = rotated // 2
    angle = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    angle = jnp.asarray(np.concatenate([angle, angle], -1), x.dtype).reshape(1, x.shape[1], *(1,) * (x.ndim - 3), -1)
    swapped = jnp.concatenate([-turn[..., half:], turn[..., :half]], -1)
    return jnp.concatenate([turn * jnp.cos(angle) + swapped * jnp.sin(angle), rest], -1)


def rms(x, gain):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * gain


def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]).astype(q.dtype)
    mask = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), bool))
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), v)


def broadcast_heads(k, times):
    b, t, h, d = k.shape
    return jnp.broadcast_to(k[:, :, :, None], (b, t, h, times, d)).reshape(b, t, h * times, d)


def tile_heads(k, times):
    return jnp.tile(k, (1, 1, times, 1))


REPEATS = {"broadcast": broadcast_heads, "repeat": partial(jnp.repeat, axis=2), "tile": tile_heads}


def llama(p, x, repeat="broadcast", rotate=rope, fused=False, norm=False, kv=2, queries=4, dim=4):
    """One block on embedded tokens, torch's [out, in] layout."""
    b, t = x.shape
    h = p["embed"][x]
    y = rms(h, p["ln1"])
    if fused:
        qkv = y @ p["qkv"].T
        q, k, v = jnp.split(qkv, [kv * queries * dim, kv * queries * dim + kv * dim], -1)
    else:
        q, k, v = (y @ p[name].T for name in "qkv")
    q, k, v = q.reshape(b, t, -1, dim), k.reshape(b, t, kv, dim), v.reshape(b, t, kv, dim)
    if norm:
        q, k = rms(q, p["q_norm"]), rms(k, p["k_norm"])
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    if repeat == "sdpa":
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    else:
        k, v = (jax.lax.optimization_barrier(REPEATS[repeat](a, queries)) for a in (k, v))
        mixed = attend(q, k, v)
    h = h + mixed.reshape(b, t, -1) @ p["o"].T
    y = rms(h, p["ln2"])
    gate, up = jnp.split(y @ p["gate_up"].T, 2, -1) if fused else (y @ p["gate"].T, y @ p["up"].T)
    h = h + (jax.nn.silu(gate) * up) @ p["down"].T
    return rms(h, p["ln"]) @ p["embed"].T


def llama_params(fused=False, norm=False, kv=2, queries=4, dim=4, width=32, ff=20):
    inner, small = kv * queries * dim, kv * dim
    p = {"embed": shape(17, width), "ln1": shape(width), "ln2": shape(width), "ln": shape(width)}
    p |= {"o": shape(width, inner), "down": shape(width, ff)}
    p |= {"qkv": shape(inner + 2 * small, width)} if fused else {
        "q": shape(inner, width), "k": shape(small, width), "v": shape(small, width)
    }  # fmt: skip
    p |= {"gate_up": shape(2 * ff, width)} if fused else {"gate": shape(ff, width), "up": shape(ff, width)}
    return p | ({"q_norm": shape(dim), "k_norm": shape(dim)} if norm else {})


PLAIN = [(32, (), None), (20, (), 3), (2, (), None), (4, (2,), None), (4, (2,), None)]


def llama_case(groups=None, **options):
    sizes = {k: v for k, v in options.items() if k in ("fused", "norm", "kv", "queries", "dim")}
    apply = partial(llama, **options)
    return Case(apply, llama_params(**sizes), (tokens(2, 5),), PLAIN if groups is None else groups, {})


def moe(p, x, style="dense"):
    scores = x @ p["router"]
    if style == "dense":
        weight = jax.nn.one_hot(jnp.argmax(scores, -1), 4) * jax.nn.softmax(scores, -1)
        h = jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["w1"]))
        return jnp.einsum("bef,efo,be->bo", h, p["w2"], weight)
    value, chosen = jax.lax.top_k(jax.nn.softmax(scores, -1), 1)
    if style == "take":
        w1, w2 = jnp.take(p["w1"], chosen[:, 0], axis=0), jnp.take(p["w2"], chosen[:, 0], axis=0)
        return jnp.einsum("bf,bfo->bo", jax.nn.relu(jnp.einsum("bd,bdf->bf", x, w1)), w2) * value
    order = jnp.argsort(chosen[:, 0])
    sizes = jnp.bincount(chosen[:, 0], length=4)
    h = jax.nn.relu(jax.lax.ragged_dot(x[order], p["w1"], sizes))
    return jnp.zeros((x.shape[0], p["w2"].shape[-1]), x.dtype).at[order].set(jax.lax.ragged_dot(h, p["w2"], sizes))


def moe_case(style):
    p = {"router": shape(6, 4), "w1": shape(4, 6, 20), "w2": shape(4, 20, 3)}
    experts = [] if style == "ragged" else [(4, (), 3)]
    hidden = (20, (4,), 2) if style == "dense" else (20, (), 2)
    return Case(partial(moe, style=style), p, (image(7, 6),), [*experts, hidden], {})


class LSTM(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.RNN(nn.LSTMCell(8))(x)))


class GRU(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.GRUCell(8))(x))


def block(h, p, rotate=rope):
    b, t, _ = h.shape
    q, k, v = (jnp.einsum("btr,rhd->bthd", h, p[name]) for name in "qkv")
    if rotate is not None:
        q, k = rotate(q), rotate(k)
    h = h + jnp.einsum("bthd,hdr->btr", attend(q, k, v), p["o"])
    return h + jax.nn.relu(h @ p["w1"] + p["b1"]) @ p["w2"]


def stacked(p, x, rotate=rope):
    body = jax.checkpoint(lambda h, layer: (block(h, layer, rotate), None))
    h, _ = jax.lax.scan(body, p["embed"][x], p["layers"])
    return h @ p["head"]


def looped(p, x):
    h = p["embed"][x]
    for i in range(3):
        h = block(h, {k: v[i] for k, v in p["layers"].items()})
    return h @ p["head"]


def stacked_params():
    layers = {name: shape(3, 12, 3, 4) for name in "qkv"}
    layers |= {"o": shape(3, 3, 4, 12), "w1": shape(3, 12, 16), "b1": shape(3, 16), "w2": shape(3, 16, 12)}
    return {"embed": shape(17, 12), "layers": layers, "head": shape(12, 5)}


def stacked_case(rotate=rope):
    groups = [(12, (), 8), (16, (3,), 3), (3, (3,), 4), (4, (3, 3), 2)]
    apply = partial(stacked, rotate=rotate)
    return Case(apply, stacked_params(), (tokens(2, 5),), groups + ([(4, (3, 3), 2)] if rotate is None else []), {})


CASES = {
    "mlp": mlp,
    "vgg with pools and flatten": vgg,
    "small resnet with batch norm": small_resnet,
    "resnet-50 with batch norm": resnet50,
    "depthwise and grouped convolutions": grouped_convs,
    "group norm": group_norm,
    "dense net": dense_net,
    "vit": vit,
    "gpt-2": gpt2,
    **{f"llama, heads by {r}": partial(llama_case, repeat=r) for r in (*REPEATS, "sdpa")},
    "llama without rope": partial(llama_case, [*PLAIN, (4, (2,), 2)], rotate=None),
    "llama with partial rope": partial(
        llama_case,
        [*PLAIN[:4], (8, (2,), None), (4, (2,), None)],
        rotate=partial(rope, rotated=4),
        dim=8,
    ),
    "llama with qk norm": partial(llama_case, [*PLAIN, (4, (), 4)], rotate=None, norm=True),
    "llama with qk norm and rope": partial(llama_case, norm=True),
    "phi-3 fused": partial(llama_case, fused=True),
    "mixture of experts, one hot": partial(moe_case, "dense"),
    "mixture of experts, take": partial(moe_case, "take"),
    "mixture of experts, ragged": partial(moe_case, "ragged"),
    "lstm": lambda: of_linen(LSTM(), image(2, 4, 3), [(8, (), 19)]),
    "gru": lambda: of_linen(GRU(), image(2, 4, 3), [(8, (), 14)]),
    "stacked transformer in scan": stacked_case,
    "stacked transformer in scan without rope": partial(stacked_case, None),
    "stacked transformer in a loop": lambda: Case(
        looped, stacked_params(), (tokens(2, 5),), [(12, (), None), (16, (), 3), (3, (), 4), (4, (3,), 2)], {}
    ),
}


def heads_gram(p, x):
    h = jnp.einsum("bi,ihd->bhd", x, p["w"])
    return jnp.einsum("bhg,hg->b", jnp.tanh(jnp.einsum("bhd,bgd->bhg", h, h)), p["m"])


def heads_mixed(p, x):
    h = jnp.einsum("bi,ihd->bhd", x, p["w"])
    h = jnp.tanh(h + jnp.einsum("gh,bhd->bgd", p["m"], h))
    return jnp.einsum("bhd,hdo->bo", h, p["o"])


def stacked_and_reversed(p, x):
    def body(h, w):
        return h + jnp.tanh(h @ w[0]) @ w[1], None

    return jax.lax.scan(body, x, (p["w"] + p["w"][::-1], p["o"] + p["o"][::-1]))[0]


COUNTER_EXAMPLES = {
    "gram": (heads_gram, {"w": (4, 3, 5), "m": (3, 3)}, {"w": (None, "H", "D"), "m": ("H", "H")}),
    "mixed": (
        heads_mixed,
        {"w": (4, 3, 5), "m": (3, 3), "o": (3, 5, 2)},
        {"w": (None, "H", "D"), "m": ("H", "H"), "o": ("H", "D", None)},
    ),
    "reversed": (
        stacked_and_reversed,
        {"w": (3, 4, 5), "o": (3, 5, 4)},
        {"w": ("H", None, "D"), "o": ("H", "D", None)},
    ),
}
