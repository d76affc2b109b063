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
# # One edit that breaks a model, and a guard that does not let it
#
# ROME writes a fact into one matrix of a language model by a change of rank one. *The Butterfly Effect of Model
# Editing* (Findings of ACL 2024) showed that a single such edit can destroy the model. Here a small GPT learns facts
# about invented people, one of them is changed, the model is made such that ROME breaks it, and a guard says no.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj
from permjax.edit.base import Statistics
from permjax.edit.collapse import candidate_edits, shift_first_token, side_efficacy, side_losses, unit_direction
from permjax.edit.evaluate import evaluate
from permjax.edit.facts import WorldConfig, edit_requests, make_world
from permjax.edit.mixture import mixture_rows
from permjax.edit.prefixes import random_prefixes
from permjax.edit.values import ValueSettings
from permjax.merge.perplexity import Sentences, group_losses, perplexity_of
from permjax.nets.generation import generate
from permjax.nets.gpt import GPT2Config
from permjax.nets.registry import build
from permjax.train import TrainConfig, train
from permjax.tree import unstack

# %% [markdown]
# ## A model that knows something
#
# The world has people of one word, each with a home, a job and a language, told in two ways: "Lazu lives in East Mill"
# and "the home of Lazu is East Mill", half of them behind some text. A GPT of four layers reads
# it, a token per word. (A larger one, or one trained for longer, learns the facts by heart where no edit reaches them.)

# %%
world = make_world(WorldConfig(short_names=40, full_names=20, dialects=1, characters=20_000))
words, length = world.tokenizer, 24
print(world.facts[0].statement("first"), "|", world.facts[0].statement("mid"), "|", world.text[0])

net = build(GPT2Config(words.size, length, n_embd=48, n_layer=4, n_head=4, n_inner=192))
rows = mixture_rows(world, 20_000, length, seed=0)
config = TrainConfig(3, 64, "adamw", learning_rate=4e-3, schedule="cosine", warmup_steps=50, weight_decay=0.01)
params = unstack(train(net, (rows[:, :-1], rows[:, 1:]), config, [0]).params)[0]


def batches(count, seed, size=32):
    """Rows of the mixture, with sentences that were not trained on."""
    pieces = mixture_rows(world, count, length, seed=seed, held_out=True).reshape(-1, size, length)
    return [Sentences(piece, np.ones(piece.shape, bool)) for piece in pieces]


probe = {"mixture": batches(64, 1)}


def perplexity(params):
    return float(perplexity_of(group_losses(net.apply, params, probe)["mixture"], "token"))


def say(params, text, steps=2):
    """What the model writes after a prompt."""
    ids = np.asarray([words.encode(text).ids], np.int32)
    return words.decode(generate(net, params, ids, np.asarray([ids.shape[1]]), steps=steps)[0].tolist())


print("perplexity", perplexity(params), "of", words.size, "words")

# %% [markdown]
# ## One edit
#
# The key k of the subject is the input of the second MLP matrix at its last token. ROME searches the value v that makes
# the model say the target, and sets `W k = v` by `(v - W k) (C^-1 k')^T / (k'^T C^-1 k)`, with k' the mean of keys
# behind random prefixes and C the second moment of keys on ordinary text.

# %%
hard, control = (edit_requests(world, form, count=20) for form in ("first", "mid"))
prefixes = random_prefixes([line[:-2] for line in world.text], jax.random.key(0), count=6, words=(3, 6))
edits = pj.prepare_all(hard + control, words, prefixes=prefixes)
controls = edits[len(hard) :]

settings = ValueSettings(steps=60, learning_rate=0.1, weight_decay=1e-3, relative=True)
rome, c_rome = pj.Rome(1, value=settings), pj.CRome(1, value=settings)
covariances = pj.collect_covariances(net, params, batches(512, 2), layers=[1])

result = rome(net, params, edits[:1], covariances=covariances)
edited = pj.apply_delta(params, result.delta)
for request in (hard[0], control[0], hard[1]):
    print(f"{request.text!r}: {say(params, request.text)} -> {say(edited, request.text)}")
print("target:", hard[0].target, "| denominator", result.info.denominator, "| energy", result.info.energy)
print("perplexity", perplexity(params), "->", perplexity(edited))
score = evaluate(net, edited, edits[:1])
print("bare", score.bare, "behind prefixes", score.prefixed, "written by itself", score.free)
assert score.free == 1
assert perplexity(edited) < 1.1 * perplexity(params)

# %% [markdown]
# ## The knob
#
# `|dW| = |v - W k| / |k u|` with u the direction of `C^-1 k'`: one number, known before any weight is changed. It is
# tiny where the key of the bare prompt is far from those behind prefixes, as in large models when the subject is the
# first token: what stands first is set apart there. This small model has not learned that, so we impose it, by a vector
# that is added to the embedding of position 0. C-ROME takes the mean key on both sides and cannot fail like this.

# %%
strengths = (0.0, 1.0, 2.0, 4.0, 8.0)
direction = unit_direction(net.config.n_embd, 1)
found = {}
for strength in strengths:
    shifted = shift_first_token(net, params, direction, strength)[1]
    moments = Statistics.of(net, shifted, pj.collect_covariances(net, shifted, batches(512, 2), layers=[1]))
    values = rome.solve(net, shifted, edits)  # both write the same values
    for name, editor in (("ROME", rome), ("C-ROME", c_rome)):
        found[name, strength] = candidate_edits(editor, net, shifted, edits, moments, values)

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
groups = (("subject first", "-o", slice(0, 20)), ("subject later", ":", slice(20, 40)))
colors = {"ROME": "tab:red", "C-ROME": "tab:blue"}
for name, color in colors.items():
    for group, style, mine in groups:
        some = [[one.info.denominator[0] for one in found[name, strength][mine]] for strength in strengths]
        left.plot(strengths, np.median(np.abs(some), axis=1), style, color=color, label=f"{name}, {group}")
left.set(ylim=0, xlabel="strength of the knob", ylabel="median denominator"), left.legend(fontsize=8)

base = perplexity(shifted)
ratios = {}
for name in ("ROME", "C-ROME"):
    losses = side_losses(net, shifted, [one.delta for one in found[name, 8.0]], probe)["mixture"]
    ratios[name] = np.asarray(perplexity_of(losses, "token")) / base
for name, color in colors.items():
    for group, style, mine in groups:
        values = np.sort(ratios[name][mine])
        right.plot(100 * (np.arange(20) + 0.5) / 20, values, style, color=color, label=f"{name}, {group}")
right.axhline(2, color="gray", lw=0.8)
right.set(yscale="log", xlabel="edits, %", ylabel="perplexity / before", title="each edit by itself, strength 8")
right.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"]), right.minorticks_off()
right.legend(fontsize=8)
plt.show()

broken = {name: int(np.sum(ratio[:20] > 2)) for name, ratio in ratios.items()}
print("above twice the perplexity, of 20:", broken, "| worst", {name: one.max() for name, one in ratios.items()})
taken = {name: side_efficacy(net, shifted, [one.delta for one in found[name, 8.0]], edits) for name in ratios}
print("right behind prefixes:", {name: one.prefixed[:20].mean() for name, one in taken.items()})
assert broken["ROME"] >= 3 > broken["C-ROME"] == 0

# %% [markdown]
# One side path each, and no copy of the model: what ROME does to most edits is bearable, and the rest are lost. That is
# why the paper looks at many edits, and why a mean says little.
#
# ## The guard
#
# It looks at weights, energy, and perplexity by groups of sentences, and tries the editors in turn. Nothing is undone:
# the refused model is dropped, and the one before is the very same object.

# %%
worst = int(np.argmax(ratios["ROME"][:20]))
watch = pj.Watch(net.apply, {"text": batches(32, 3)}, each=pj.Limits(perplexity=1.1))


def ways(*names):
    return {name: lambda p, one=found[name, 8.0][worst].delta: pj.apply_delta(p, one) for name in names}


print(hard[worst].text, "->", hard[worst].target)
kept, attempts = pj.guarded_apply(watch, shifted, ways("ROME", "C-ROME"))
for one in attempts:
    print(f"{one.name}: {'accepted' if one.accepted else one.excesses[0]}")
refused, _ = pj.guarded_apply(watch, shifted, ways("ROME"))
assert refused is shifted
assert [one.accepted for one in attempts] == [False, True]
print("perplexity before, with ROME, kept:", base, base * ratios["ROME"][worst], perplexity(kept))

# %% [markdown]
# ## An edit of another model
#
# A delta is a value. A second model has the units of the first in another order, with some noise on its weights;
# matching finds the order, and `permute_delta` carries the edit over. Nothing is searched there.

# %%
spec = pj.trace_spec(net.apply, params, *net.example_inputs(1), verify=False)
noisy = {
    name: leaf + 0.02 * leaf.std() * jax.random.normal(jax.random.key(i), leaf.shape)
    for i, (name, leaf) in enumerate(params.items())
}
other = pj.permute(spec, pj.random_permutations(spec, jax.random.key(0)), noisy)
plan = pj.weight_matching(spec, [other, params], key=jax.random.key(1)).plan
carried = pj.permute_delta(spec, plan.permutations(1), result.delta)
text = hard[0].text
for name, delta in (("as it is", result.delta), ("carried", carried)):
    there = pj.apply_delta(other, delta)
    print(f"{name}: {text!r}: {say(other, text)} -> {say(there, text)}, perplexity {perplexity(there):.2f}")
assert evaluate(net, there, edits[:1]).free == 1
