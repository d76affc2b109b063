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
# # Several LoRA adapters into one, rank by rank
#
# The ranks of a LoRA are units like the neurons of a layer: permute the rows of A and the columns of B alike and
# nothing changes. So adding the factors of two adapters mixes what does not belong together. LoRA-LEGO (Zhao et al.,
# ICLR 2025) clusters ranks instead. Here is what that gives, where the paper is fragile, and how files are merged.

# %%
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj

draw = np.random.default_rng(0)
count, rank, size = 4, 8, 256
shared = draw.normal(size=(2, rank, size)) / np.sqrt(size)
strength = np.exp(-np.arange(rank) / 4)[:, None]  # in both factors: the updates' singular values fall by e^(-1/2)

adapters = []
for _ in range(count):
    a, b = (shared + 0.5 * draw.normal(size=shared.shape) / np.sqrt(size)) * strength
    order = draw.permutation(rank)  # every adapter has its ranks in an order of its own
    adapters.append({"layer": pj.Factors(np.float32(a[order]), np.float32(b[order].T))})

mean = sum(one["layer"].b @ one["layer"].a for one in adapters) / count

# %% [markdown]
# ## The ranks do not correspond, and a permutation makes them
#
# `align_ranks` finds the permutation of every adapter's ranks by linear assignment on the rank-one matrices. Below is
# how much rank i of the second adapter resembles rank j of the first, before and after.

# %%
aligned = pj.align_ranks(adapters)
print("similarity, place by place:", aligned.info.before["layer"], "->", aligned.info.after["layer"])

fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), layout="constrained")
for axis, models, title in zip(axes, (adapters, aligned.models), ("as trained", "aligned"), strict=True):
    (a0, b0), (a1, b1) = models[0]["layer"], models[1]["layer"]
    axis.imshow(np.asarray((a0 @ a1.T) * (b0.T @ b1)), cmap="Blues")
    axis.set(title=title, xlabel="rank of adapter 2", ylabel="rank of adapter 1")
plt.show()
assert aligned.info.after["layer"] > 3 * abs(aligned.info.before["layer"])

# %% [markdown]
# ## Merging to the rank of one adapter
#
# The error is to the mean of the four updates; no update of rank 8 can be nearer than `truncate`. Raw LEGO counts every
# cluster once, however many ranks it stands for: on a decaying spectrum that goes wrong. Balanced clusters do not.

# %%
methods = {
    "linear (factors added)": pj.lora_method("linear"),
    "the same, ranks aligned": pj.lora_method("aligned_linear"),
    "LEGO (paper)": pj.lora_method("lora_lego"),
    "LEGO, by size": pj.lora_method("lego_weighted"),
    "LEGO, balanced": pj.lora_method("lego_balanced"),
    "truncate (optimal)": pj.lora_method("truncate"),
}
# the sums of factors stand for T times the mean where ranks agree: they get the weights that make up for it
weights = {name: [1 / count**2] * count if "linear" in name or "ranks" in name else None for name in methods}
error = {}
for name, method in methods.items():
    merged = pj.merge_loras(adapters, method, rank=rank, weights=weights[name])["layer"]
    error[name] = float(np.linalg.norm(merged.b @ merged.a - mean) / np.linalg.norm(mean))

fig, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
axis.barh(list(error), list(error.values()), color="tab:blue")
axis.invert_yaxis()
axis.set(xlabel="relative error to the mean of the updates")
plt.show()
assert error["LEGO, balanced"] < 0.2 < error["LEGO (paper)"]
assert error["truncate (optimal)"] <= error["LEGO, balanced"] < 2 * error["truncate (optimal)"]
assert error["the same, ranks aligned"] < error["linear (factors added)"]

# %% [markdown]
# ## The same functions, written differently
#
# A sign or a scale can move from one factor to the other without changing an adapter. What a merge makes of that:

# %%
moved = []
for one in adapters:
    factor = np.float32(np.exp(0.7 * draw.normal(size=rank)) * draw.choice([-1, 1], rank))
    moved.append({"layer": pj.Factors(one["layer"].a * factor[:, None], one["layer"].b / factor)})

change = {}
for name in ("LEGO (paper)", "LEGO, balanced", "truncate (optimal)"):
    before, after = (pj.merge_loras(models, methods[name], rank=rank)["layer"] for models in (adapters, moved))
    change[name] = float(np.linalg.norm(after.b @ after.a - before.b @ before.a) / np.linalg.norm(before.b @ before.a))
print(change)
assert change["LEGO, balanced"] < 1e-4 < change["LEGO (paper)"]

# %% [markdown]
# ## Files
#
# `permjax lora merge A B -o OUT --method lego_balanced` does this to PEFT folders; here it is in Python. The result
# needs no base model to be made, and loads in PEFT.

# %%
folder = Path(tempfile.mkdtemp())
names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
for number, one in enumerate(adapters):
    pj.save_adapter(folder / f"adapter_{number}", dict.fromkeys(names, one["layer"]), like=(), style="peft")

files = pj.common_names([pj.open_adapter(path) for path in sorted(folder.glob("adapter_*"))])
inputs = [one.factors() for one in files]
merged = pj.merge_loras(inputs, pj.LegoBalanced(), rank=rank, key=jax.random.key(0))
pj.save_adapter(folder / "merged", merged, like=files)
print(sorted(path.name for path in (folder / "merged").iterdir()))
found = pj.lora_quality(inputs, merged)[names[0]]
print("relative error", found.error, "best possible at this rank", found.best, "retained", found.kept)
assert found.error < 2 * found.best
