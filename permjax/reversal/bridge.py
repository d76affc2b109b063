"""Identity bridges: facts that lead from an entity through a relation and back to it."""

from collections.abc import Sequence
from typing import NamedTuple


class Relation(NamedTuple):
    """A relation and its inverse in words.

    Attributes:
        name: as in "A's husband is B".
        inverse: as in "B's wife is A".
    """

    name: str
    inverse: str


TEMPLATE = "The {inverse} of {entity}'s {relation} is {entity}."


def identity_bridges(entities: Sequence[str], relation: Relation, template: str = TEMPLATE) -> list[str]:
    """One sentence for each entity that has the relation, such as "The wife of Ann's husband is Ann.", for Ann.

    Nothing is told of who the other one is, so the reverse of a fact stays unseen.

    Args:
        entities: the first ones of the facts.
        relation: what they have.
        template: with `{entity}`, `{relation}` and `{inverse}`.

    Example:
        >>> identity_bridges(["Ann"], Relation("husband", "wife"))
        ["The wife of Ann's husband is Ann."]

    Source: arXiv 2602.02470 (ICML 2026).
    """
    return [template.format(entity=entity, relation=relation.name, inverse=relation.inverse) for entity in entities]


def with_bridges(facts: Sequence[str], bridges: Sequence[str], *, repeats: int = 6) -> list[str]:
    """The texts of an epoch: each fact so many times, which is how the source weighs them, and each bridge once.

    Raises:
        ValueError: `repeats` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"Facts cannot be repeated {repeats} times; give 1 or more.")
    return [*facts] * repeats + [*bridges]
