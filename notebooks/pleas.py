# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One network out of two, of the size you choose
#
# Two networks were trained from different seeds, one on the digits 0 to 4, one on 5 to 9. PLeaS (Nasery, Hayase, Koh
# and Oh, CVPR 2025) makes one network of them without labels: units that match are merged, others kept, and every layer
# is fitted by least squares. Here is what that is worth, with the controls that keep one honest, in about a minute.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj
from permjax.data.registry import load
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.train import TrainConfig, train
from permjax.tree import unstack

data = load("digits")
net = build(MLPConfig(input_shape=(8, 8), hidden=(64, 64, 64), classes=5))
recipe = TrainConfig(epochs=30, batch_size=50, learning_rate=2e-3, schedule="cosine")
parents = []
for seed, digits in enumerate((range(5), range(5, 10))):
    train_mine, test_mine = np.isin(data.y_train, digits), np.isin(data.y_test, digits)
    seen = data.x_train[train_mine], data.y_train[train_mine] - digits[0]
    asked = data.x_test[test_mine], data.y_test[test_mine] - digits[0]
    parents += unstack(train(net, (*seen, *asked), recipe, seeds=[seed]).params)

x_test, y_test = jnp.asarray(data.x_test), data.y_test
spec = pj.trace_spec(net.apply, parents[0], x_test[:2])
heads = pj.own_heads(spec, net.apply, parents[0], x_test[:2])
print(heads.groups, heads.leaves)

# %% [markdown]
# ## Unlabelled data, and whose domain it is from
#
# 400 training images of both parents. *Owners* say which parent an image belongs to: only the owner mode is told.

# %%
chosen = np.random.default_rng(0).permutation(len(data.x_train))[:400]
batches = [jnp.asarray(data.x_train[chosen[i : i + 100]]) for i in range(0, 400, 100)]
owners = [(data.y_train[chosen[i : i + 100]] >= 5).astype(int) for i in range(0, 400, 100)]
aligned = pj.activation_matching(spec, parents, apply=net.apply, data=batches).models

# %%
budgets, scores, info = (1.0, 1.2, 1.5, 2.0), {}, None
modes = {
    "permutation only": None,
    "PLeaS, parallel": {},
    "PLeaS, owner": {"mode": "sequential", "targets": "owner", "owners": owners},
    "no permutation, owner": {"mode": "sequential", "targets": "owner", "owners": owners},
}
for name, options in modes.items():
    models = parents if name.startswith("no") else aligned
    for budget in budgets:
        shared = {"apply": net.apply, "data": batches}
        plan = pj.pleas_plan(heads.spec, models, budget=budget, apart=heads.groups, **shared)
        if options is None:  # what the plan alone gives: nothing is fitted
            every = [leaf.name for leaf in spec.leaves]
            result = pj.pleas(heads.spec, models, plan, keep=every, **shared)
        else:
            result = pj.pleas(heads.spec, models, plan, keep=heads.leaves, **shared, **options)
        merged = pj.block_apply(heads.spec, plan, net.apply, joined="concatenate")
        logits = merged(result.models[0], x_test)
        scores[name, budget] = 100 * float((np.argmax(logits, axis=1) == y_test).mean())
        info = result.info if (name, budget) == ("PLeaS, owner", 1.0) else info

# %%
both = np.concatenate([net.apply(parent, x_test) for parent in parents], axis=1)
ensemble = 100 * float((both.argmax(1) == y_test).mean())
print(f"{'accuracy over all ten digits':30}" + "".join(f"{b:8.1f}x" for b in budgets))
for name in modes:
    print(f"{name:30}" + "".join(f"{scores[name, b]:8.1f} " for b in budgets))
print(f"{'ensemble of both parents':30}{ensemble:35.1f}")

# %%
fig, ax = plt.subplots(figsize=(6, 3.5))
for name in modes:
    ax.plot(budgets, [scores[name, b] for b in budgets], marker="o", label=name)
ax.axhline(ensemble, color="grey", linestyle=":", label="ensemble")
ax.set(xlabel="FLOPs, as a multiple of one parent's", ylabel="accuracy over all ten digits [%]")
_ = ax.legend()

# %% [markdown]
# At twice the FLOPs nothing is shared, and the merged network *is* the ensemble. Below that, fitting gives back much of
# what averaging loses. Look at the last row too: on a network as small as this one, fitting layer after layer repairs
# so much that the permutation hardly matters, or even hurts. On convolutional networks it matters for parallel fits.

# %%
for layer, before, after in zip(info.layers, info.before, info.after, strict=True):
    print(f"{layer:28} residual {before:.3f} -> {after:.3f}")

assert abs(scores["PLeaS, parallel", 2.0] - ensemble) < 0.5
assert scores["PLeaS, owner", 1.0] > scores["permutation only", 1.0] + 10
assert (info.after <= info.before).all()

# %% [markdown]
# ## What it costs
#
# FLOPs are counted as the network runs: blocks between the own units of different parents are zero and never computed.
# Stored as dense arrays it takes more.

# %%
work = pj.contractions(net.apply, heads.spec, parents[0], x_test[:1])
for budget in budgets:
    plan = pj.pleas_plan(heads.spec, aligned, apply=net.apply, data=batches, budget=budget, apart=heads.groups)
    relative = pj.cost(work, heads.spec, plan).relative
    print(f"budget {budget}: " + ", ".join(f"{name} {value:.2f}" for name, value in relative.items()))
