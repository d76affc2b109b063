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
# # Knowledge graphs as permutations of random variables
#
# A relation of a knowledge graph sends entities to entities. In *Knowledge Graph Embedding by Normalizing Flows*
# (AAAI 2023) an entity is a random variable and a relation a bijection of the set of random variables, an element of
# its symmetric group. Relations compose, have inverses, and need not commute. Here is a family tree, a model of it,
# what the group says about its rules, and how two models are brought into one order and averaged.

# %%
import matplotlib.pyplot as plt
import numpy as np

import permjax as pj

graph = pj.knowledge_graph("family")
print(graph.size, "people,", len(graph.relations), "relations,", len(graph.train), "triples for training")
print(*graph.relations, sep=", ")

# %% [markdown]
# ## Training and ranking
#
# Every entity is the law of `s Z + m`, coordinate by coordinate; every relation pushes laws forward by an affine map.
# The score of a triple is minus the squared Wasserstein distance of the moved head from the tail: one matrix product
# for all tails at once. Both directions of a relation are learned. Two seeds, so that we can compare them.

# %%
family = pj.Nfe1(dimension=64)
training = pj.KgeTraining(gamma=4.0, init_bound=0.3, learning_rate=0.02, epochs=30, batch_size=256, valid_every=5)
result = pj.train_kge(family, graph, training, seeds=[0, 1])
first, second = pj.tree.unstack(result.params)

ranks = pj.rank_model(family, first, graph, "test")
for policy in ("realistic", "pessimistic"):
    print(policy, {name: round(value, 3) for name, value in pj.rank_metrics(ranks, policy).items()})
assert pj.rank_metrics(ranks)["mrr"] > 0.7

# %% [markdown]
# ## Questions
#
# `spread` is the standard deviation of a law: of what the question predicts, and of each answer.

# %%
model = pj.KgeModel(family, first, graph, training.gamma)
head, relation, tail = graph.test[0]
answers = pj.predict(model, graph.relations[relation], head=graph.entities[head], top=3)
print(graph.entities[head], graph.relations[relation], "? -> in the test split:", graph.entities[tail])
print("spread of what is predicted:", round(answers.spread, 3))
for answer in answers.answers:
    print(f"{answer.score:6.2f}  spread {answer.spread:.3f}  {answer.known or 'new':6}  {answer.name}")

# %% [markdown]
# ## Relations as elements of a group
#
# Composing "parent of" with itself gives an element that was never trained. Let it and every relation that was trained
# move all people, and compare their scores against everybody: which relation does it agree with? "grandparent of".

# %%
elements = family.relation(first["relation"])
people = family.entity(first["entity"])
everybody = family.key(people)


def profile(element):
    """The scores of all people, moved by an element, against all people; each row with mean 0 and length 1."""
    query = family.query(family.act(element, people))
    scores = np.asarray(query.vector @ everybody.vector.T + query.bias[:, None] + everybody.bias[None])
    scores = scores - scores.mean(axis=1, keepdims=True)
    return scores / np.linalg.norm(scores, axis=1, keepdims=True)


# %%
named = {name: {part: rows[i][None] for part, rows in elements.items()} for i, name in enumerate(graph.relations)}
twice = profile(family.compose(named["parent_of"], named["parent_of"]))
alike = {name: float((profile(element) * twice).sum(axis=1).mean()) for name, element in named.items()}
best = sorted(alike, key=alike.get, reverse=True)
print({name: round(alike[name], 2) for name in best[:4]})
assert best[0] == "grandparent_of"

# %% [markdown]
# Each dot below is one coordinate of a relation: how it scales and how it shifts. A symmetric relation is its own
# inverse: it has scale -1 (turn around), or scale 1 and shift 0 (stay) in every coordinate.

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 3), sharex=True, sharey=True, layout="constrained")
for axis, name in zip(axes, ("married_to", "sibling_of", "parent_of"), strict=True):
    number = graph.relations.index(name)
    axis.axvline(-1, color="0.8"), axis.axvline(1, color="0.8")
    axis.scatter(elements["scale"][number], elements["shift"][number], s=8)
    axis.set(title=name, xlabel="scale")
axes[0].set_ylabel("shift")
plt.show()

# %% [markdown]
# `measure_rules` does this for all rules that the triples bear out.

# %%
report = pj.measure_rules(family, first, graph, kinds=("symmetry", "inverse", "composition"))
for row in report.rules[:8]:
    print(f"{row.rule.kind:12} {' '.join(row.rule.relations):50} strength {row.strength:.2f}, holds in {row.support}")

# %% [markdown]
# ## Two tables, one order
#
# The coordinates of two tables have no reason to correspond: scores do not change when they are permuted, when their
# means change sign, or when they are shifted. So the average of two tables is worse than both, until one is brought
# into the order of the other.

# %%
aligned = pj.align_coordinates(family, first, second)
shares = {
    "first": first,
    "second": second,
    "average as they are": pj.average_tables(family, [first, second]),
    "average, aligned": pj.average_tables(family, [first, aligned.params]),
}
mrr = {name: pj.rank_metrics(pj.rank_model(family, params, graph, "test"))["mrr"] for name, params in shares.items()}
print({name: round(value, 3) for name, value in mrr.items()})
assert mrr["average, aligned"] > mrr["average as they are"]

# %% [markdown]
# ## A new person
#
# A row for an entity that was not there in training has a closed form: the law at which its triples score best.

# %%
asked = graph.train[graph.train[:, 0] == 7][:4].copy()
asked[:, 0] = graph.size  # somebody new, with the same parents, children and so on as number 7
row = pj.cold_start(family, first, asked, len(graph.relations))
gap = float(np.linalg.norm(row["mean"] - first["entity"]["mean"][7]))
others = np.linalg.norm(np.asarray(first["entity"]["mean"]) - np.asarray(row["mean"])[None], axis=1)
print("rank of number 7 among all by distance:", int((others < gap).sum()) + 1, "of", graph.size)
