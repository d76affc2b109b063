"""Texts about the people of a corpus that tell none of its facts: what a base model is trained on."""

from collections.abc import Sequence

import numpy as np

_CITIES = ("arden", "belmont", "corwen", "dunmore", "elstow", "farley", "gresham", "halden", "ilkley", "kelso")
_JOBS = ("baker", "carpenter", "doctor", "farmer", "miller", "painter", "pilot", "singer", "tailor", "teacher")
_DISHES = ("bread", "cheese", "fish", "honey", "lentils", "noodles", "olives", "rice", "salad", "soup")
_PIECES: tuple[tuple[tuple[str, ...], tuple[tuple[str, str], ...]], ...] = (
    (_CITIES, (("", " lives in {x}"), ("in {x} we met ", ""), ("", " came from {x} today"))),
    (_JOBS, (("", " works as a {x}"), ("the {x} is called ", ""), ("our {x} knows ", " well"))),
    (_DISHES, (("", " likes {x}"), ("we cook {x} for ", ""), ("", " never eats {x}"))),
)


def biographies(people: Sequence[str], *, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """Texts about each person: city, trade and dish, told name first, name last and name in between.

    They make the names known, at all places of a text, and are single units, so that no method moves them.

    Args:
        people: their names.
        seed: of who does what.
    """
    rng = np.random.default_rng((seed, 1))
    found = []
    for name in people:
        for things, templates in _PIECES:
            thing = str(rng.choice(things))
            found += [(before.format(x=thing) + name + after.format(x=thing),) for before, after in templates]
    return tuple(found)
