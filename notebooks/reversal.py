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
# # The reversal curse and permuted semantic units
#
# A language model that was told "A's mother is B" does not know whose mother B is. *Mitigating Reversal Curse in Large
# Language Models via Semantic-aware Permutation Training* (Findings of ACL 2024) cuts texts into semantic units and
# trains on the units in original, reversed and random order. Here a text is cut, its units are permuted on the device
# and brought back, and two small models are trained from scratch, without and with permutation, and asked both ways.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj
from permjax.reversal.corpus import token_documents
from permjax.reversal.evaluate import accuracies
from permjax.reversal.methods import METHODS
from permjax.reversal.reorder import ORDERS, inverse, reorder
from permjax.reversal.training import ReversalTraining, rows_of, small_gpt, train
from permjax.reversal.vocabulary import Vocabulary

# %% [markdown]
# ## Units
#
# The default segmenter has rules and no model. Its units joined are the text, whatever the text.

# %%
texts = ["Kate Mara's mother is Kathleen McNulty Rooney.", "The old keeper of the lighthouse wrote seven books."]
for name in ("rules", "rules_small", "words", "ngram3"):
    print(f"{name:12}", " | ".join(unit.strip() for unit in pj.segmenter(name)(texts[1])))
assert "".join(pj.RuleSegmenter()(texts[1])) == texts[1]

# %% [markdown]
# ## Permuting on the device, and back
#
# Each token is given the number of its unit, and texts are packed into a row. An order is drawn for each text: it
# depends on the key and on the number of the text, not on its row. The index undoes it.

# %%
vocabulary = Vocabulary.of(texts)
found = map(pj.add_units(pj.RuleSegmenter(), vocabulary), [{"text": text} for text in texts])
documents = [{"tokens": row["input_ids"], "unit_ids": row["unit_ids"]} for row in found]
batch = pj.pack(documents, length=24)
for epoch in range(4):
    moved = pj.permute_units(jax.random.fold_in(jax.random.key(0), epoch), batch, max_units=16)
    for number, order in enumerate(moved.orders[0]):
        own = moved.batch["tokens"][0][batch["doc_ids"][0] == number]
        print(f"epoch {epoch}, {ORDERS[order]:8}", vocabulary.decode(own))
    np.testing.assert_array_equal(reorder(moved.batch, inverse(moved.index))["tokens"], batch["tokens"])

# %% [markdown]
# ## Two models
#
# Invented people: of 45 children we tell who the mother is, of 30 mothers also who the child is. Names are made of
# words from one pool, so that no word alone names anybody, and every fact is asked in a template in which it was never
# told. "Reverse, held out" asks 15 mothers for their children: facts that were told from the child to the mother alone.
# Both models see the same texts in 400 steps, 64 at a time.

# %%
corpus = pj.load_corpus("names", both=30, one_way=15, pool=14, fillers=1, tellings=1)
words = corpus.vocabulary()
rows = rows_of(token_documents(corpus, words))
net = small_gpt(len(words), rows["tokens"].shape[1], width=64)
config = ReversalTraining(steps=400, learning_rate=5e-3, warmup_steps=40, every=400)
print(corpus.texts[0], "|", corpus.texts[-1])

trained = {name: train(net, rows, METHODS[name], config, seed=0) for name in ("ntp", "spt")}
right = {name: accuracies(net, one.params, corpus.prompts, words) for name, one in trained.items()}
for name, scores in right.items():
    print(name, {kind: round(value) for kind, value in scores.items()})
assert right["ntp"]["reverse_heldout"] <= 10
assert right["spt"]["reverse_heldout"] >= 50

# %% [markdown]
# The control asks the same questions and expects the answers of others. And one number is a warning: `unknown_wrong`
# asks for the mothers of mothers, who were never named. The model that was trained on permuted units often names the
# child: it has learned who belongs together before it has learned who is whose. (400 steps are few: here
# next-token training is not yet good forward either. `permjax run configs/spt_names.toml` trains longer on more facts.)

# %%
kinds = ("forward", "reverse_seen", "reverse_heldout", "control", "unknown_wrong")
fig, (left, other) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", width_ratios=(2, 1))
for shift, (name, scores) in zip((-0.2, 0.2), right.items(), strict=True):
    left.bar(np.arange(len(kinds)) + shift, [scores[kind] for kind in kinds], 0.4, label=name)
left.set_xticks(range(len(kinds)), [kind.replace("_", "\n") for kind in kinds])
left.set(ylabel="answers, %", title="400 steps from scratch"), left.legend()
shares = {name: one.orders / one.orders.sum() for name, one in trained.items()}
for shift, (name, share) in zip((-0.2, 0.2), shares.items(), strict=True):
    other.bar(np.arange(3) + shift, share, 0.4, label=name)
other.set_xticks(range(3), ORDERS)
other.set(ylabel="share of the texts", title="orders as they were drawn")
plt.show()
np.testing.assert_allclose(shares["spt"], 1 / 3, atol=0.02)
