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
# # Why weight matching connects networks
#
# Ito, Yamada and Kumagai ("Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", ICLR 2025) say:
# weight matching hardly shortens the distance between two networks; it turns the dominant singular vectors of their
# layers the same way. A method that only looks for a low loss between two networks does not, and then two networks
# aligned to the same third one are not aligned to each other. Here is that on three small networks, in about a minute.

# %%
from itertools import combinations

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj
from permjax.data.registry import load
from permjax.lmc.intervention import truncate
from permjax.lmc.landscape import plane
from permjax.lmc.taylor import taylor_barrier
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.train import TrainConfig, accuracy, cross_entropy, train
from permjax.tree import unstack

HIDDEN, EPOCHS = (256, 256), 20
data = load("digits")
net = build(MLPConfig(input_shape=(8, 8), hidden=HIDDEN))
trained = train(net, data, TrainConfig(epochs=EPOCHS, batch_size=100), seeds=[0, 1, 2])
a, b, c = models = unstack(trained.params)
test = (jnp.asarray(data.x_test), jnp.asarray(data.y_test))
spec = pj.trace_spec(net.apply, a, test[0][:2])
print("test accuracy:", trained.history["test_accuracy"][-1].round(3))

# %% [markdown]
# ## Three ways to line up b and c with a

# %%
key = jax.random.key(0)


def metrics(params, x, y):
    logits = net.apply(params, x)
    return {"loss": cross_entropy(logits, y), "accuracy": accuracy(logits, y)}


def loss(params, batch):
    x, y = batch
    return cross_entropy(net.apply(params, x), y)


batches = [
    (jnp.asarray(data.x_train[i : i + 200]), jnp.asarray(data.y_train[i : i + 200])) for i in range(0, 1400, 200)
]
ste = pj.ste_matching(spec, models, loss=loss, data=batches, key=key, latent="permutation", together=False)
aligned = {
    "no permutation": models,
    "weight matching": pj.weight_matching(spec, models, key=key).models,
    "STE, matrices": ste.models,
}
print("the search came to rest:", ste.info.converged)

# %%
barriers = {
    name: [pj.barrier(metrics, trio[i], trio[j], test, points=3).barrier_mid for i, j in combinations(range(3), 2)]
    for name, trio in aligned.items()
}
agreement = {name: pj.r_metric(spec, a, trio[1]).total for name, trio in aligned.items()}
print(f"{'':18}{'a-b':>8}{'a-c':>8}{'b-c':>8}{'R':>8}   L2 reduction")
for name, heights in barriers.items():
    shorter = pj.l2_reduction_percent(spec, a, b, aligned[name][1])
    print(f"{name:18}" + "".join(f"{h:8.3f}" for h in heights) + f"{agreement[name][0]:8.3f}{shorter:8.1f} %")

# %% [markdown]
# Weight matching joins all pairs, b-c included, which it never saw together. The search by loss lowers the barrier to
# the anchor, too, but its R stays near zero.

# %%
assert max(barriers["weight matching"]) < 0.5 * min(barriers["no permutation"])
assert agreement["STE, matrices"][0] < 0.6 * agreement["weight matching"][0]

# %% [markdown]
# ## Distance is not the mechanism
#
# A second-order Taylor expansion around both networks, which knows distances and curvatures, does not see the barrier:

# %%
compared = ("no permutation", "weight matching")


def mean_loss(params, x, y):
    return loss(params, (x, y))


for name in compared:
    guess = taylor_barrier(mean_loss, a, aligned[name][1], test)
    print(f"{name:18} true {barriers[name][0]:6.3f}, second-order estimate {guess.barrier:6.3f}")

# %% [markdown]
# ## A few directions carry it
#
# Match on the top k singular directions of every layer alone, or on all the others, and permute the whole network by
# what was found (so its function stays the same):

# %%
sweep = (1, 4, 16, 64)
heights = {"top k": [], "all but the top k": []}
for k in sweep:
    parts = truncate(spec, a, k), truncate(spec, b, k)
    for name, (one, other) in zip(heights, zip(*parts, strict=True), strict=True):
        order = pj.weight_matching(spec, [one, other], key=key).plan.permutations(1)
        heights[name].append(pj.barrier(metrics, a, pj.permute(spec, order, b), test, points=3).barrier_mid)

figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, values in heights.items():
    axes[0].plot(sweep, values, marker="o", label=name)
axes[0].axhline(barriers["no permutation"][0], color="grey", linestyle=":", label="no permutation")
axes[0].set(xscale="log", xlabel="k", ylabel="barrier a-b [nats]", title="Matching on some directions only")
axes[0].legend()
for name, values in agreement.items():
    axes[1].plot((0, 0.1, 0.2, 0.3, 0.5), values, marker="o", label=name)
axes[1].set(xlabel="threshold γ", ylabel="R(a, b)", title="Agreement of singular vectors")
axes[1].legend()
plt.show()

# %% [markdown]
# ## The plane through the three

# %%
planes = {name: plane(metrics, trio, test, points=13) for name, trio in aligned.items()}
heights = np.concatenate([np.log10(found.loss).ravel() for found in planes.values()])
shared = np.linspace(heights.min(), heights.max(), 16)
figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
for ax, (name, found) in zip(axes, planes.items(), strict=True):
    levels = ax.contourf(found.x, found.y, np.log10(found.loss), levels=shared)
    ax.scatter(*found.models.T, color="white", edgecolor="black")
    for label, place in zip("abc", found.models, strict=True):
        ax.annotate(label, place, textcoords="offset points", xytext=(5, 5), color="white")
    ax.set(title=name, aspect="equal")
figure.colorbar(levels, label="log10 of the test loss")
plt.show()

# %% [markdown]
# ## One order for all
#
# Matching every pair by itself gives maps that disagree around a triangle. Through a common order they cannot:

# %%
pairs = pj.pairwise_matching(spec, models, lambda spec, pair: pj.weight_matching(spec, pair, key=key))
universe = pj.universe_matching(spec, models, key=key)
print("units astray around the triangle, pair by pair:", round(pj.cycle_error(spec, pairs), 3))
print("through a universe:", pj.cycle_error(spec, pj.pairwise_maps(spec, universe.plan)))
merged = pj.average(spec, universe.models).models[0]
print("accuracy of the mean of all three:", float(accuracy(net.apply(merged, test[0]), test[1])))
