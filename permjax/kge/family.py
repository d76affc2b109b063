"""A generated family tree as a knowledge graph: rules that hold without exception, and nothing to download."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from permjax.kge.evidence import evidence
from permjax.kge.triples import Graph, GraphError, Rule

_RULES: dict[str, tuple[str, ...]] = {
    "symmetry": ("married_to", "sibling_of", "cousin_of", "lives_with"),
    "antisymmetry": ("parent_of", "mother_of", "father_of", "grandparent_of", "aunt_or_uncle_of", "guardian_of"),
    "inverse": (
        "parent_of child_of",
        "grandparent_of grandchild_of",
        "aunt_or_uncle_of niece_or_nephew_of",
    ),
    "hierarchy": (
        "mother_of parent_of",
        "father_of parent_of",
        "married_to lives_with",
        "guardian_of parent_of",
        "guardian_of lives_with",
    ),
    "exclusion": ("mother_of father_of", "sibling_of cousin_of", "parent_of child_of", "married_to sibling_of"),
    "composition": (
        "parent_of parent_of grandparent_of",
        "child_of child_of grandchild_of",
        "sibling_of parent_of aunt_or_uncle_of",
        "child_of sibling_of niece_or_nephew_of",
        "child_of aunt_or_uncle_of cousin_of",
        "child_of parent_of sibling_of",
        "sibling_of sibling_of sibling_of",
        "married_to mother_of father_of",
        "married_to father_of mother_of",
        "married_to parent_of parent_of",
        "lives_with lives_with lives_with",
    ),
    "intersection": ("parent_of lives_with guardian_of",),
}
RELATIONS = tuple(
    "parent_of child_of mother_of father_of married_to sibling_of cousin_of grandparent_of grandchild_of "
    "aunt_or_uncle_of niece_or_nephew_of lives_with guardian_of".split()
)
_CERTAIN = ("mother_of", "married_to", "lives_with")  # what all else follows from
_SUPPORT = 10  # pairs that must bear out a rule of the whole tree

_WOMEN = "Ada Berta Clara Dora Emma Frida Greta Hanna Ida Judith Klara Lena Mara Nora Olga Paula Rosa Selma Thea Vera"
_MEN = "Adam Bruno Carl David Emil Felix Georg Hugo Ivan Jonas Kurt Leo Max Niels Otto Paul Robert Samuel Theo Victor"
_FAMILIES = "Adler Berg Cramer Dahl Engel Falk Graf Holm Iversen Jensen Keller Lund Moser Norden Ohlsen Pohl Quist Roth"


def family_rules() -> tuple[Rule, ...]:
    """Rules that hold in every generated tree because of what the words mean."""
    return tuple(Rule(kind, tuple(rule.split())) for kind, rules in _RULES.items() for rule in rules)


def family_graph(
    seed: int = 0, *, couples: int = 12, generations: int = 4, children: int = 3, held_out: float = 0.1
) -> Graph:
    """A family tree of couples, their children and grandchildren, with 13 relations.

    Children of couples marry into other families of their generation as long as there is somebody who is neither
    sibling nor cousin; who is not married lives with the parents. All triples of valid and test follow from train by
    `family_rules()`, in one or several steps.

    Args:
        seed: of the tree and of the split.
        couples: number of couples of the first generation.
        generations: number of generations.
        children: mean number of children of a couple.
        held_out: the part of all triples that is for validation, and the same again for testing.

    Returns:
        The graph; its `rules` are all those that hold without exception for at least ten pairs of the whole tree, a
        superset of those of `family_rules()` of which the tree has ten.

    Raises:
        GraphError: the numbers give no tree that can be split.
    """
    if couples < 4 or generations < 3 or children < 2 or not 0 < held_out <= 0.2:
        seen = f"couples {couples}, generations {generations}, children {children} and held_out {held_out}"
        message = f"a family tree needs 4 couples, 3 generations, 2 children and 0 < held_out <= 0.2; given are {seen}."
        raise GraphError(message)
    rng = Random(seed)
    people = _people(rng, couples, generations, children)
    triples = np.array(sorted(set(_triples(people))), np.int32)
    size = round(held_out * len(triples))
    free = rng.sample(_free(people, triples), 2 * size)
    train = np.delete(triples, free, axis=0)
    found = evidence(triples, len(people), len(RELATIONS), support=_SUPPORT)
    certain = [row for row in found if row.confidence == 1]
    rules = tuple(Rule(row.kind, tuple(RELATIONS[r] for r in row.relations)) for row in certain)
    valid, test = triples[free[:size]], triples[free[size:]]
    return Graph("family", _names(people), RELATIONS, train, valid, test, rules)


# the tree


@dataclass(eq=False)
class _Person:
    number: int
    name: str
    woman: bool
    parents: tuple["_Person", ...] = ()
    spouse: "_Person | None" = None
    children: list["_Person"] = field(default_factory=list)

    @property
    def siblings(self) -> list["_Person"]:
        return [child for child in self.parents[0].children if child is not self] if self.parents else []

    @property
    def cousins(self) -> list["_Person"]:
        return [child for parent in self.parents for other in parent.siblings for child in other.children]

    @property
    def household(self) -> list["_Person"]:
        """The others at home: a couple and its unmarried children."""
        head = self if self.spouse else self.parents[0] if self.parents else self
        members = [head, *([head.spouse] if head.spouse else []), *(c for c in head.children if not c.spouse)]
        return [member for member in members if member is not self]


def _people(rng: Random, couples: int, generations: int, children: int) -> list[_Person]:
    """All people, in the order of their birth."""
    women, men, families = _WOMEN.split(), _MEN.split(), _FAMILIES.split()
    people: list[_Person] = []

    def born(family: str, woman: bool, parents: tuple[_Person, ...] = ()) -> _Person:
        person = _Person(len(people), f"{rng.choice(women if woman else men)} {family}", woman, parents)
        people.append(person)
        for parent in parents:
            parent.children.append(person)
        return person

    pairs = [tuple(born(families[i % len(families)], woman) for woman in (True, False)) for i in range(couples)]
    for generation in range(generations):
        for one, other in pairs:
            one.spouse, other.spouse = other, one
        if generation == generations - 1:
            break
        young = [
            born(father.name.split()[-1], rng.random() < 0.5, (mother, father))
            for mother, father in pairs
            for _ in range(rng.randint(children - 1, children + 1))
        ]
        pairs = _matched(rng, young) if generation < generations - 2 else []
    return people


def _matched(rng: Random, young: Sequence[_Person]) -> list[tuple[_Person, _Person]]:
    """Couples of women and men who are not related, in a random order, until nobody is left for somebody."""
    men = [person for person in young if not person.woman]
    rng.shuffle(men)
    pairs = []
    for woman in rng.sample([person for person in young if person.woman], sum(p.woman for p in young)):
        related = {*woman.siblings, *woman.cousins}
        match = next((man for man in men if man not in related), None)
        if match:
            men.remove(match)
            pairs.append((woman, match))
    return pairs


def _names(people: Sequence[_Person]) -> tuple[str, ...]:
    """Names with a numeral where several people share one."""
    seen: Counter[str] = Counter()
    names = []
    for person in people:
        seen[person.name] += 1
        names.append(person.name + (f" {seen[person.name]}" if seen[person.name] > 1 else ""))
    return tuple(names)


# the triples


def _facts(person: _Person) -> Iterator[tuple[str, _Person]]:
    """What a person is to others."""
    home = set(person.household)
    for child in person.children:
        yield "parent_of", child
        yield ("mother_of" if person.woman else "father_of"), child
        if child in home:
            yield "guardian_of", child
        yield from (("grandparent_of", grandchild) for grandchild in child.children)
    for parent in person.parents:
        yield "child_of", parent
        yield from (("grandchild_of", grandparent) for grandparent in parent.parents)
        yield from (("niece_or_nephew_of", other) for other in parent.siblings)
    for sibling in person.siblings:
        yield "sibling_of", sibling
        yield from (("aunt_or_uncle_of", child) for child in sibling.children)
    yield from (("cousin_of", cousin) for cousin in person.cousins)
    yield from (("lives_with", other) for other in home)
    if person.spouse:
        yield "married_to", person.spouse


def _triples(people: Sequence[_Person]) -> Iterator[tuple[int, int, int]]:
    for person in people:
        for relation, other in _facts(person):
            yield person.number, RELATIONS.index(relation), other.number


def _free(people: Sequence[_Person], triples: np.ndarray) -> list[int]:
    """The triples that may be held out; the others stay in train because everything follows from them.

    These are a mother's: her children, her spouse, and the children that she lives with.
    """
    mothers = {person.number for person in people if person.woman and person.spouse}
    certain = [RELATIONS.index(relation) for relation in _CERTAIN]
    kept = np.isin(triples[:, 1], certain) & np.isin(triples[:, 0], [*mothers])
    return np.flatnonzero(~kept).tolist()
