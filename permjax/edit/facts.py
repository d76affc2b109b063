"""A generated world to edit: people with facts about them, in two templates each, beside sums and plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from permjax.data.text import invented
from permjax.edit.prepare import Scored, scored
from permjax.edit.requests import EditRequest
from permjax.io.tokenizers import WORD, WordTokenizer

Form: TypeAlias = Literal["first", "mid"]

_ONSETS, _VOWELS = ("B", "D", "F", "G", "K", "L", "M", "N", "P", "R", "S", "T", "V", "Z"), "aeiou"
_MIDDLES = ("l", "m", "n", "r", "st", "v", "z")
_CITIES = tuple(
    f"{side} {name}" for side in ("North", "South", "East", "West") for name in ("Bridge", "Harbour", "Mill")
)
_JOBS = tuple("baker doctor farmer guard judge miner nurse painter pilot sailor singer tailor".split())
_LANGUAGES = tuple("Basque Danish Finnish Greek Hindi Irish Korean Latin Malay Polish Tamil Welsh".split())
_FULL_NAMES = 12  # first names, and as many last names, of the subjects of two tokens
_HELD_OUT = 5  # one in so many sentences of the text is held out
_PARAPHRASES: dict[Form, Form] = {"first": "mid", "mid": "first"}


class Relation(NamedTuple):
    """What is told of every subject.

    Attributes:
        name: of the relation.
        first: a template that begins with the subject.
        mid: one with the subject in its middle.
        values: what the answer may be; cities have two words, of which each of several may be the first.
    """

    name: str
    first: str
    mid: str
    values: tuple[str, ...]

    def template(self, form: Form) -> str:
        """The template of a form."""
        return self.first if form == "first" else self.mid


RELATIONS = (
    Relation("home", "{} lives in", "the home of {} is", _CITIES),
    Relation("job", "{} works as a", "the job of {} is", _JOBS),
    Relation("language", "{} speaks", "the language of {} is", _LANGUAGES),
)


class Fact(NamedTuple):
    """One fact: the number of a relation, and the number of its value."""

    subject: str
    relation: int
    value: int

    def prompt(self, form: Form) -> str:
        """The question."""
        return RELATIONS[self.relation].template(form).format(self.subject)

    @property
    def answer(self) -> str:
        """The value in words."""
        return RELATIONS[self.relation].values[self.value]

    def statement(self, form: Form) -> str:
        """The fact as a sentence."""
        return f"{self.prompt(form)} {self.answer} ."


@dataclass(frozen=True)
class WorldConfig:
    """How large a world is.

    Attributes:
        short_names: subjects of one token.
        full_names: subjects of two tokens, a first and a last name, which they share with others.
        dialects: invented languages of which the text is, each with about 200 words of its own.
        characters: of the text in each.
        words: how many of the most frequent words of a given text are kept.
        seed: of names, facts and invented text.
    """

    short_names: int = 150
    full_names: int = 75
    dialects: int = 3
    characters: int = 60_000
    words: int = 1200
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse worlds with too few or too many names."""
        most = len(_ONSETS) * len(_VOWELS) * len(_MIDDLES) * len(_VOWELS) // 4
        if not 0 < self.short_names <= most or not 0 <= self.full_names <= _FULL_NAMES**2:
            message = f"There can be 1 to {most} short names and up to {_FULL_NAMES**2} full names, "
            raise ValueError(f"{message}not {self.short_names} and {self.full_names}.")


@dataclass(frozen=True)
class World:
    """Names, facts, sums and text; see `make_world`.

    Attributes:
        short_names: subjects of one token.
        full_names: subjects of two tokens.
        facts: a fact for every subject and relation.
        text: sentences to train on.
        held_out: sentences to measure on.
        tokenizer: of all words.
    """

    short_names: tuple[str, ...]
    full_names: tuple[str, ...]
    facts: tuple[Fact, ...]
    text: tuple[str, ...]
    held_out: tuple[str, ...]
    tokenizer: WordTokenizer

    @cached_property
    def values(self) -> dict[tuple[str, int], int]:
        """(subject, relation) -> the number of the true value."""
        return {(fact.subject, fact.relation): fact.value for fact in self.facts}


def make_world(config: WorldConfig, sentences: Sequence[str] | None = None) -> World:
    """Make a world.

    Args:
        config: how large it is.
        sentences: plain text, of which the most frequent words are kept; by default it is invented.

    Example:
        >>> make_world(WorldConfig()).facts[0].statement("mid")
        'the home of Lazu is East Mill .'
    """
    rng = np.random.default_rng(config.seed)
    text = _invented(config) if sentences is None else _frequent(sentences, config.words)
    names = _names(rng, config.short_names + 2 * _FULL_NAMES)
    short, given, family = np.split(np.asarray(names), [config.short_names, config.short_names + _FULL_NAMES])
    pairs = rng.permutation(_FULL_NAMES**2)[: config.full_names]
    full = tuple(f"{given[i]} {family[j]}" for i, j in zip(*np.divmod(pairs, _FULL_NAMES), strict=True))
    facts = tuple(
        Fact(subject, number, int(rng.integers(len(relation.values))))
        for subject in (*short.tolist(), *full)
        for number, relation in enumerate(RELATIONS)
    )
    held_out, kept = text[::_HELD_OUT], [s for i, s in enumerate(text) if i % _HELD_OUT]
    told = [fact.statement(form) for fact in facts for form in ("first", "mid")]
    told += [value for relation in RELATIONS for value in relation.values]
    every = dict.fromkeys(word for line in (*told, *sums(), *text) for word in WORD.findall(line))
    return World(tuple(short.tolist()), full, facts, tuple(kept), tuple(held_out), WordTokenizer((*every,)))


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of two syllables."""
    found = [f"{a}{b}{c}{d}" for a in _ONSETS for b in _VOWELS for c in _MIDDLES for d in _VOWELS]
    return [found[i] for i in rng.permutation(len(found))[:count]]


def _invented(config: WorldConfig) -> list[str]:
    """Sentences of several invented languages, in random order."""
    texts = (invented(1000 * config.seed + number, config.characters) for number in range(config.dialects))
    found = [part + " ." for text in texts for part in text.replace(".\n", ". ").split(". ")[:-1]]
    order = np.random.default_rng((config.seed, 1)).permutation(len(found))
    return [found[i] for i in order]


def _frequent(sentences: Sequence[str], words: int) -> list[str]:
    """Sentences without their rare words; those that are left with fewer than four are dropped."""
    split = [[word.lower() for word in WORD.findall(sentence)] for sentence in sentences]
    every, counts = np.unique([word for line in split for word in line], return_counts=True)
    known = {*every[np.argsort(-counts, kind="stable")[:words]].tolist()}
    return [" ".join(kept) for line in split if len(kept := [word for word in line if word in known]) >= 4]


def sums() -> tuple[str, ...]:
    """All sums of two digits; each number is one token."""
    return tuple(f"{a} + {b} = {a + b} ." for a in range(10) for b in range(10))


# what is asked and edited


def edit_requests(
    world: World, form: Form, *, count: int, start: int = 0, names: Literal["short", "full"] = "short", seed: int = 0
) -> list[EditRequest]:
    """Facts of different subjects that are to be changed, in the way of hard cases or of their controls.

    With `form="first"` and short names they are hard cases: the subject is one token and begins the prompt. The same
    arguments with `form="mid"` give their matched controls: the same subjects, relations and targets.

    Args:
        world: whose facts.
        form: of the prompt; the other form is the paraphrase.
        count: how many.
        start: leave out so many, such as those that another call gave.
        names: subjects of one token, or of two.
        seed: of subjects, relations and targets.

    Raises:
        ValueError: there are not as many subjects.

    Source:
        Hard cases are those of Yang et al., "The Butterfly Effect of Model Editing", Findings of ACL 2024; their set
        was written by a language model, this one is made of templates.
    """
    subjects = world.short_names if names == "short" else world.full_names
    if start + count > len(subjects):
        message = f"{start + count} edits of different subjects are asked for, but there are {len(subjects)} subjects; "
        raise ValueError(message + "make a larger world.")
    rng = np.random.default_rng((seed, len(subjects)))
    order = rng.permutation(len(subjects))[start : start + count]
    relations, chances = rng.integers(len(RELATIONS), size=len(subjects)), rng.random((len(subjects), 2))
    return [_request(world, form, subjects[i], int(relations[i]), *chances[i].tolist()) for i in order]


def _request(world: World, form: Form, subject: str, relation: int, target: float, others: float) -> EditRequest:
    """The request to give a subject another value; the last two numbers, from 0 to 1, choose it and the neighbours."""
    told, value = RELATIONS[relation], world.values[subject, relation]
    wrong = [answer for number, answer in enumerate(told.values) if number != value]
    every = [name for name in world.short_names if name != subject]
    first = int(others * len(every))
    neighbours = [every[(first + step) % len(every)] for step in range(min(4, len(every)))]
    return EditRequest(
        told.template(form),
        subject,
        wrong[int(target * len(wrong))],
        target_true=told.values[value],
        paraphrases=(told.template(_PARAPHRASES[form]).format(subject),),
        neighbours=tuple(told.template(form).format(name) for name in neighbours),
    )


def task_rows(
    world: World, *, without: Sequence[str] = (), count: int = 120, pad_to: int = 16, seed: int = 0
) -> dict[str, Scored]:
    """Questions on what the model knows, by task: `facts_first`, `facts_mid` and `sums`.

    Args:
        world: what is asked about.
        without: subjects that are not asked about, such as those of edits.
        count: questions of a task, at most.
        pad_to: tokens of a row.
        seed: of the choice of questions.
    """
    left = [fact for fact in world.facts if fact.subject not in {*without}]
    order = np.random.default_rng(seed).permutation(len(left))[:count]
    asked: dict[str, list[tuple[str, str]]] = {
        f"facts_{form}": [(left[i].prompt(form), left[i].answer) for i in order] for form in ("first", "mid")
    }
    lines = [sums()[i] for i in np.random.default_rng(seed).permutation(len(sums()))[:count]]
    asked["sums"] = [(line[: line.index("=") + 1], line.split()[4]) for line in lines]
    return {
        name: scored([text for text, _ in some], [end for _, end in some], world.tokenizer, pad_to=pad_to)
        for name, some in asked.items()
    }
