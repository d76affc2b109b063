"""Questions to a trained model: the best answers by name, and vectors for an index of inner products."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from permjax.kge.base import Linear, Point
from permjax.kge.model_files import KgeModel
from permjax.kge.models import moved, product


class Answer(NamedTuple):
    """One answer to a question.

    Attributes:
        name: of the entity.
        score: gamma and the similarity.
        known: the split of the graph that has it, `train`, `valid` or `test`; empty for an answer that is new.
        spread: the root mean square of the standard deviations of the entity's law; None where entities are points.
    """

    name: str
    score: float
    known: str
    spread: float | None


class Answers(NamedTuple):
    """The best answers to a question.

    Attributes:
        answers: the best first.
        spread: of the law that the question predicts, as that of each answer.
    """

    answers: tuple[Answer, ...]
    spread: float | None


def predict(
    model: KgeModel, relation: str, *, head: str | None = None, tail: str | None = None, top: int = 10
) -> Answers:
    """The entities that answer (head, relation, ?) or (?, relation, tail) best: exact maximum inner product.

    Args:
        model: a trained model.
        relation: its name.
        head: the name of the head, to be told tails.
        tail: the name of the tail, to be told heads; one of the two is given.
        top: how many answers.

    Raises:
        GraphError: there is no entity or relation of this name; suggests the nearest.
        ValueError: not one of head and tail is given, or top is not positive.

    Example:
        >>> predict(model, "parent_of", head="p17").answers[0].name  # doctest: +SKIP
        'p23'
    """
    if (head is None) == (tail is None):
        raise ValueError("A question has a head or a tail: give one of them, and the other one is told.")
    if top < 1:
        raise ValueError(f"'top' is {top}, but a question has at least one answer.")
    graph, number = model.graph, model.graph.relation(relation)
    turned = (number + len(graph.relations)) % (2 * len(graph.relations))
    question = (graph.entity(tail), turned) if tail is not None else (graph.entity(str(head)), number)
    x = moved(model.family, model.params, *(jnp.array([part]) for part in question))
    everyone = model.family.entity(model.params["entity"])
    scores = model.gamma + np.asarray(product(model.family.query(x), model.family.key(everyone)))[0]
    predicted, spreads, known = _spread(model, x), _spread(model, everyone), _known(model, question)
    best = np.argsort(-scores, kind="stable")[:top].tolist()
    found = tuple(
        Answer(graph.entities[i], float(scores[i]), known.get(i, ""), None if spreads is None else float(spreads[i]))
        for i in best
    )
    return Answers(found, None if predicted is None else float(predicted[0]))


def index_keys(model: KgeModel) -> Float[np.ndarray, "entities width"]:
    """The vectors of all entities for an index of inner products: keys, with their biases as last coordinates."""
    key = model.family.key(model.family.entity(model.params["entity"]))
    return np.concatenate([np.asarray(key.vector), np.asarray(key.bias)[:, None]], axis=1)


def index_queries(
    model: KgeModel, heads: Int[np.ndarray, " n"], relations: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "n width"], Float[np.ndarray, " n"]]:
    """The vectors of questions for an index of inner products, and what else there is in their scores.

    An entity scores the inner product of the vectors, and a constant of the question; so its rank is that by inner
    product, in an exact index, and in an approximate one as far as it is right.

    Args:
        model: a trained model.
        heads: ids of entities.
        relations: ids of relations; r + R asks for the heads of r.

    Returns:
        The vectors, and the constants of the questions with gamma.

    Example:
        >>> vectors, constants = index_queries(model, heads, relations)  # doctest: +SKIP
        >>> scores = vectors @ index_keys(model).T + constants[:, None]  # doctest: +SKIP
    """
    query: Linear = model.family.query(moved(model.family, model.params, jnp.asarray(heads), jnp.asarray(relations)))
    vectors = np.concatenate([np.asarray(query.vector), np.ones((len(heads), 1), np.float32)], axis=1)
    return vectors, np.asarray(query.bias) + np.float32(model.gamma)


def _known(model: KgeModel, question: tuple[int, int]) -> dict[int, str]:
    """The answers that the graph has, with the first split that has them."""
    found: dict[int, str] = {}
    for split in reversed(model.graph.splits):
        triples = model.graph.both_ways(split)
        asked = (triples[:, :2] == question).all(axis=1)
        found |= dict.fromkeys(triples[asked, 2].tolist(), split)
    return found


def _spread(model: KgeModel, point: Point) -> Float[np.ndarray, " n"] | None:
    deviation = model.family.deviation(point)
    return None if deviation is None else np.sqrt(np.mean(np.asarray(deviation) ** 2, axis=-1))
