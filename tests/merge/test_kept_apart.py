"""Networks of every kind: kept apart a merged network is its parents, merged plainly it is their average."""

import jax
import jax.numpy as jnp
import pytest
import zoo

from permjax.merge.average import average
from permjax.merge.block_apply import block_apply
from permjax.merge.initial import contracted_axes, wide_average
from permjax.merge.partial import partial_plan, widenable
from permjax.merge.wide import Wide
from permjax.symmetry.trace import trace_spec

pytestmark = pytest.mark.usefixtures("ordinary_promotion")

ZOO = [
    "mlp",
    "vgg with pools and flatten",
    "small resnet with batch norm",
    "depthwise and grouped convolutions",
    "group norm",
    "vit",
    "mixture of experts, one hot",
    "lstm",
]
LLAMA = {"kv": 2, "queries": 2, "dim": 4}


def untied(p, x):
    """Grouped queries, rotary positions, gated MLP; the head is a leaf of its own."""
    b, t = x.shape
    h = p["embed"][x]
    y = zoo.rms(h, p["ln1"])
    q, k, v = (y @ p[name].T for name in "qkv")
    q, k, v = q.reshape(b, t, -1, 4), k.reshape(b, t, 2, 4), v.reshape(b, t, 2, 4)
    k, v = (zoo.broadcast_heads(a, 2) for a in (zoo.rope(k), v))
    h = h + zoo.attend(zoo.rope(q), k, v).reshape(b, t, -1) @ p["o"].T
    y = zoo.rms(h, p["ln2"])
    h = h + (jax.nn.silu(y @ p["gate"].T) * (y @ p["up"].T)) @ p["down"].T
    return zoo.rms(h, p["ln"]) @ p["head"].T


def stacked(p, x):
    """Layers in `scan` with nothing inside that could not be widened: all on one stream."""

    def body(h, layer):
        return h + jnp.tanh(h @ layer["w"] + layer["b"]), None

    return jax.lax.scan(body, jax.nn.relu(x @ p["in"]), p["layers"])[0] @ p["out"]


def batched(p, x):
    """Experts by batched products, with biases."""
    weight = jax.nn.softmax(x @ p["router"], -1)
    h = jax.nn.relu(jnp.einsum("ebd,edf->ebf", jnp.broadcast_to(x, (4, *x.shape)), p["w1"]) + p["b1"][:, None])
    return jnp.einsum("ebo,be->bo", jnp.einsum("ebf,efo->ebo", h, p["w2"]), weight)


OWN = {
    "llama, untied": (
        untied,
        zoo.llama_params(**LLAMA, width=16, ff=12) | {"head": zoo.shape(17, 16)},
        (zoo.tokens(2, 5),),
    ),
    "stacked layers in scan": (
        stacked,
        {"in": zoo.shape(6, 8), "layers": {"w": zoo.shape(3, 8, 8), "b": zoo.shape(3, 8)}, "out": zoo.shape(8, 3)},
        (zoo.image(4, 6),),
    ),
    "experts by batched products": (
        batched,
        {"router": zoo.shape(6, 4), "w1": zoo.shape(4, 6, 8), "b1": zoo.shape(4, 8), "w2": zoo.shape(4, 8, 3)},
        (zoo.image(5, 6),),
    ),
}


def case_of(name):
    if name in OWN:
        return OWN[name]
    case = zoo.CASES[name]()
    return case.apply, case.params, case.inputs


QUICK = {"mlp", "small resnet with batch norm", "stacked layers in scan"}
NAMES = [pytest.param(name, marks=[pytest.mark.fast] if name in QUICK else []) for name in (*ZOO, *OWN)]


@pytest.fixture(scope="module", params=NAMES)
def net(request):
    """(name, apply, spec, abstract params, inputs, contracted axes)."""
    with jax.numpy_rank_promotion("allow"):
        apply, params, inputs = case_of(request.param)
        spec = trace_spec(apply, params, *inputs, verify=False)
        return request.param, apply, spec, params, inputs, contracted_axes(apply, params, *inputs)


def merged(spec, plan, models, summed):
    return wide_average(Wide(spec, plan), models, summed)


THREE = ["mlp", "small resnet with batch norm", "depthwise and grouped convolutions", "stacked layers in scan"]


def test_models_kept_apart_are_all_there(net, drawn, plan_of, differ):
    name, apply, spec, params, inputs, summed = net
    for models in (2, 3) if name in THREE else (2,):
        parents, plan = [drawn(params, seed) for seed in range(models)], plan_of(spec, 1, models)
        wide = merged(spec, plan, parents, summed)
        wanted = [jax.jit(apply)(parent, *inputs) for parent in parents]
        assert differ(jax.jit(block_apply(spec, plan, apply))(wide, *inputs), sum(wanted) / models) <= 3e-6


def test_models_merged_plainly_are_their_average(net, drawn, plan_of, differ):
    _, apply, spec, params, inputs, summed = net
    parents, plan = [drawn(params, seed) for seed in (0, 1)], plan_of(spec, 0)
    wide = merged(spec, plan, parents, summed)
    (mean,) = average(spec, parents).models
    assert differ(wide, mean) <= 1e-6
    found = jax.jit(block_apply(spec, plan, apply))(wide, *inputs)
    assert differ(found, jax.jit(apply)(mean, *inputs)) <= 3e-6


def test_layers_in_a_scan_are_merged_as_if_they_stood_one_after_the_other(drawn, plan_of, differ):
    case = zoo.CASES["stacked transformer in scan"]()
    names = ["q", "k", "v", "o", "w1", "b1", "w2"]

    def spread(p):
        layers = {f"{i}": {n: p["layers"][n][i] for n in names} for i in range(3)}
        return {"embed": p["embed"], "head": p["head"], "layers": layers}

    def looped(p, x):
        h = p["embed"][x]
        for i in range(3):
            h = zoo.block(h, p["layers"][str(i)])
        return h @ p["head"]

    parents = [drawn(case.params, seed) for seed in (0, 1)]
    found = []
    for apply, models in ((case.apply, parents), (looped, [spread(p) for p in parents])):
        spec = trace_spec(apply, models[0], *case.inputs, verify=False)
        (stream,) = (g.name for g in spec.groups if g.size == 12)
        plan = partial_plan(spec, ratios={stream: 0.5})
        summed = contracted_axes(apply, models[0], *case.inputs)
        wide = merged(spec, plan, models, summed)
        found.append(jax.jit(block_apply(spec, plan, apply))(wide, *case.inputs))
    assert differ(*found) <= 3e-6


@pytest.mark.parametrize("name", ["gpt-2", "llama, heads by broadcast"])
def test_a_tied_embedding_keeps_its_stream_whole(drawn, plan_of, differ, name):
    case = zoo.CASES[name]()
    spec = trace_spec(case.apply, case.params, *case.inputs, verify=False)
    parents, summed = [drawn(case.params, s) for s in (0, 1)], contracted_axes(case.apply, case.params, *case.inputs)
    embedding = "wte.weight" if name == "gpt-2" else "embed"
    stream = spec.leaf(embedding).axes[1].group
    plan = plan_of(spec, 0.5)
    with pytest.raises(ValueError, match=f"leaf '{embedding}' is summed over group '{stream}' .*keep group .* whole"):
        block_apply(spec, plan, case.apply)(merged(spec, plan, parents, summed), *case.inputs)
    others = {group: 1.0 for group in widenable(spec) if group != stream}
    plan = partial_plan(spec, ratios=others)
    twins = merged(spec, plan, [parents[0], parents[0]], summed)
    found = jax.jit(block_apply(spec, plan, case.apply))(twins, *case.inputs)
    assert differ(found, jax.jit(case.apply)(parents[0], *case.inputs)) <= 3e-6
