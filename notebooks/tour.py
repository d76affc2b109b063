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
# # A tour of permjax
#
# Two networks trained from different seeds, brought into one order and averaged. Everything here runs on a CPU in
# under a minute, on images that come with scikit-learn.
#
# In Colab, install first: `pip install "permjax @ git+<address of this repository>"`.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj
from permjax.data.registry import load
from permjax.nets.mlp import MLPConfig
from permjax.nets.registry import build
from permjax.train import TrainConfig, accuracy, cross_entropy, train
from permjax.tree import unstack

print(f"permjax {pj.__version__}, jax {jax.__version__}, {jax.devices()[0].device_kind}")

SMALL = True  # False: wider networks, longer training
HIDDEN, EPOCHS = ((128, 128), 15) if SMALL else ((512, 512), 30)

# %% [markdown]
# ## Two networks, two seeds
#
# A model is a pytree and a function. `build` gives both for a configuration; any `apply(params, x)` of yours will do.

# %%
data = load("digits")
net = build(MLPConfig(input_shape=(8, 8), hidden=HIDDEN))
trained = train(net, data, TrainConfig(epochs=EPOCHS, batch_size=100), seeds=[0, 1])
a, b = unstack(trained.params)
print("test accuracy:", trained.history["test_accuracy"][-1].round(3))

# %% [markdown]
# ## The symmetries of the network, found from its jaxpr
#
# `trace_spec` walks the computation, unites the axes that must move together, pins the rest, and checks the result with
# random permutations in float64.

# %%
x_test, y_test = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
spec = pj.trace_spec(net.apply, a, x_test[:2])
print(spec.explain())

# %% [markdown]
# Permuting every group at random changes the weights but not the function:

# %%
shuffled = pj.permute(spec, pj.random_permutations(spec, jax.random.key(0)), b)
print("distance to the unpermuted weights:", round(pj.l2_distance(spec, b, shuffled), 2))
print("largest relative change of the output:", pj.equivalence_error(net.apply, b, spec, jax.random.key(0), x_test))

# %% [markdown]
# ## Align and merge
#
# `a` is the anchor; `b` is brought into its order. The two calls below could also be one pipeline,
# `pj.chain(pj.WeightMatching(), pj.Average())`.

# %%
matched = pj.weight_matching(spec, [a, b], key=jax.random.key(1))
batches = [jnp.asarray(data.x_train[:500])]
active = pj.activation_matching(spec, [a, b], apply=net.apply, data=batches)
merged = pj.average(spec, matched.models).models[0]
print("L2 reduction:", round(pj.l2_reduction_percent(spec, a, b, matched.models[1]), 1), "%")


# %% [markdown]
# ## The line between them


# %%
def metrics(params, x, y):
    logits = net.apply(params, x)
    return {"loss": cross_entropy(logits, y), "accuracy": accuracy(logits, y)}


lines = {
    "no permutation": b,
    "weight matching": matched.models[1],
    "activation matching": active.models[1],
}
barriers = {name: pj.barrier(metrics, a, model, (x_test, y_test)) for name, model in lines.items()}
fig, ax = plt.subplots(figsize=(6, 3.5))
for name, found in barriers.items():
    ax.plot(found.t, found.loss, label=f"{name} (barrier {found.barrier_mid:.3f})")
ax.set(xlabel="position on the line", ylabel="test loss [nats]")
ax.legend(frameon=False)
fig.tight_layout()

# %% [markdown]
# The claim, checked: the barrier without permutation is at least five times the one after matching, and aligning a
# shuffled copy of `b` gives the very same merge.

# %%
assert barriers["no permutation"].barrier_mid > 5 * max(barriers["weight matching"].barrier_mid, 0.0)
again = pj.weight_matching(spec, [b, shuffled], key=jax.random.key(2)).models[1]
assert all(np.array_equal(p, q) for p, q in zip(jax.tree.leaves(again), jax.tree.leaves(b), strict=True))

# %% [markdown]
# ## Optimizer states move along
#
# A training run can go on in another order: moments and averages that mirror the parameters are permuted with them.

# %%
import optax

state = optax.adam(1e-3).init(b)
moved = pj.permute_state(spec, matched.plan.permutations(1), state)
print(jax.tree.structure(moved) == jax.tree.structure(state))

# %%
print(f"seeds 0 and 1; jax {jax.__version__}")
