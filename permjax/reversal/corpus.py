"""Corpora to measure the reversal curse with: generated facts of which some are told in one direction only.

A corpus is what is trained on, with the true units of every text, and what is asked, by kind. Words of names come from
one pool, so that no word alone names anybody; fillers before a fact keep names from standing at the same place always;
and facts are asked in a template in which they were never told, unless that is switched off.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from permjax.reversal.bridge import Relation, identity_bridges
from permjax.reversal.segment import Segmenter, check_units
from permjax.reversal.tokens import unit_ids
from permjax.reversal.vocabulary import Vocabulary, Words

FORWARD, REVERSE_SEEN, REVERSE_HELDOUT = "forward", "reverse_seen", "reverse_heldout"
CHAIN, UNKNOWN_ANSWER, CONTROL = "chain", "unknown", "control"
WRONG = "_wrong"
"""What the share of wrong answers that a prompt names adds to its kind."""
PARENTS = Relation("mother", "child")
"""The relation of the generated facts."""

Template = tuple[str, ...]

# Pieces are units; "a" and "b" stand for names, and the one that is asked for comes last.
_FORWARD: tuple[Template, ...] = (
    ("a", "'s mother is", "b"),
    ("the mother of", "a", "is", "b"),
    ("a", "has a mother named", "b"),
    ("a", "was born to", "b"),
)
_REVERSE: tuple[Template, ...] = (
    ("b", "'s child is", "a"),
    ("the child of", "b", "is", "a"),
    ("b", "has a child named", "a"),
    ("b", "gave birth to", "a"),
)
_FILLERS = ("indeed", "today", "surely", "perhaps", "clearly", "still", "again", "often", "now", "well", "here", "yes")
_ONSETS, _VOWELS, _CODAS = "bdfgklmnprstvz", "aeiou", ("", "l", "n", "r", "s")


class Prompt(NamedTuple):
    """A question.

    Attributes:
        kind: what it measures.
        text: what the model is given.
        answer: what should follow; empty where no answer is known.
        wrong: what follows if the association was learned and not the relation; empty where there is no such thing.
        most: only so many words of a long answer must be right (prefix match); all by default.
    """

    kind: str
    text: str
    answer: str
    wrong: str = ""
    most: int | None = None


@dataclass(frozen=True)
class Corpus:
    """Texts to train on, and questions.

    Attributes:
        documents: the units of each text; joined they are the text.
        prompts: the questions of all kinds.
        names: what may be an answer, for comparisons with random ones.
        heldout: the entities whose facts were told in one direction alone.
    """

    documents: tuple[tuple[str, ...], ...]
    prompts: tuple[Prompt, ...]
    names: tuple[str, ...]
    heldout: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return ["".join(units) for units in self.documents]

    def vocabulary(self) -> Vocabulary:
        """The words of the texts and of the questions."""
        asked = (text for prompt in self.prompts for text in (prompt.text, prompt.answer, prompt.wrong))
        return Vocabulary.of([*self.texts, *asked])


def forward_kinds(kinds: Iterable[str]) -> list[str]:
    """The kinds of questions that are asked in the direction of training."""
    return [kind for kind in kinds if kind.startswith(FORWARD) and not kind.endswith(WRONG)]


def reverse_kinds(kinds: Iterable[str]) -> list[str]:
    """The kinds of questions in a direction that was never told: what the reversal curse is about."""
    return [kind for kind in kinds if kind.startswith("reverse") and kind != REVERSE_SEEN and not kind.endswith(WRONG)]


def segmented(corpus: Corpus, segmenter: Segmenter) -> Corpus:
    """The corpus with units of a segmenter in the place of its own."""
    return replace(corpus, documents=tuple(check_units(text, segmenter(text)) for text in corpus.texts))


def bridged(corpus: Corpus, repeats: int = 1) -> Corpus:
    """The corpus with each text so many times and an identity bridge for every held-out entity.

    Raises:
        ValueError: the corpus names no held-out entity.
    """
    if not corpus.heldout:
        raise ValueError("The corpus names no held-out entities, so that there is nothing to build bridges for.")
    template = "the {inverse} of {entity}'s {relation} is {entity}"
    bridges = [(text,) for text in identity_bridges(corpus.heldout, PARENTS, template)]
    return replace(corpus, documents=corpus.documents * repeats + tuple(bridges))


def token_documents(corpus: Corpus, words: Words, *, tagged: bool = True) -> list[dict[str, Any]]:
    """The documents as `permjax.reversal.packing.pack` takes them.

    Each begins with the tag of the original order, where the model has tags and they are wanted, or else with the
    token that begins a text, and ends with the one that ends it; both are pinned.
    """
    special = words.special
    start = special.original if tagged else special.begin
    found = []
    for number, units in enumerate(corpus.documents):
        ids, offsets = words("".join(units))
        own, _ = unit_ids(units, offsets)
        pinned = np.zeros(len(ids) + 2, bool)
        pinned[[0, -1]] = True
        tokens = np.array([start, *ids, special.end], np.int32)
        found.append({"tokens": tokens, "unit_ids": np.pad(own, 1, constant_values=-1), "pinned": pinned})
        found[-1]["example_id"] = number
    return found


def names(
    both: int = 100, one_way: int = 100, *, pool: int = 30, fillers: int = 3, tellings: int = 4, seed: int = 0
) -> Corpus:
    """Pairs of a child and a mother: some told in both directions, some from the child to the mother alone.

    Kinds: `forward`, `reverse_seen`, `reverse_heldout`, `unknown` (the mother of a held-out mother, who was never
    named; wrong is the child), and `control`, held-out reverse questions with the answers of others.

    Args:
        both: pairs told in both directions.
        one_way: pairs told forward.
        pool: words that names are made of, two or three each.
        fillers: the most words before a fact.
        tellings: texts for each fact and template, with other fillers.
        seed: of everything.

    Raises:
        ValueError: the pool is too small for so many names.
    """
    teller = _Teller(np.random.default_rng(seed), fillers, tellings)
    people = _people(teller.rng, 2 * (both + one_way), pool)
    pairs = list(zip(people[::2], people[1::2], strict=True))
    for child, mother in pairs:
        teller.fact(_FORWARD, child, mother, FORWARD)
    for child, mother in pairs[:both]:
        teller.fact(_REVERSE, child, mother, REVERSE_SEEN)
    for child, mother in pairs[both:]:
        teller.ask(REVERSE_HELDOUT, _REVERSE, mother, child)
        teller.ask(UNKNOWN_ANSWER, _FORWARD, mother, "", child)
    return teller.corpus(people, [child for child, _ in pairs[both:]])


def chain(
    both: int = 70,
    one_way: int = 70,
    *,
    pool: int = 30,
    fillers: int = 0,
    tellings: int = 1,
    new_wording: bool = False,
    seed: int = 0,
) -> Corpus:
    """Groups of a person, her mother and her grandmother: does the relation reverse, or only the association?

    Kinds: `forward`, `reverse_seen`, `reverse_heldout`, and `chain`: the child of the middle person, of whom a mother
    was told as well; wrong is that mother. `unknown` asks for the mother of the grandmother; wrong is her child. Both
    are asked of the groups told forward. `control` is that of `names`.

    Args:
        both: groups whose two facts are told in both directions.
        one_way: groups told forward.
        pool: words that names are made of, two or three each.
        fillers: the most words before a fact.
        tellings: texts for each fact and template.
        new_wording: whether facts are asked in a template in which they were never told, as in `names`.
        seed: of everything.
    """
    teller = _Teller(np.random.default_rng(seed), fillers, tellings, new_wording)
    people = _people(teller.rng, 3 * (both + one_way), pool)
    heldout = []
    for group, (first, middle, last) in enumerate(zip(people[::3], people[1::3], people[2::3], strict=True)):
        for child, mother in ((first, middle), (middle, last)):
            teller.fact(_FORWARD, child, mother, FORWARD)
            if group < both:
                teller.fact(_REVERSE, child, mother, REVERSE_SEEN)
            else:
                teller.ask(REVERSE_HELDOUT, _REVERSE, mother, child)
                heldout.append(child)
        if group >= both:
            teller.ask(CHAIN, _REVERSE, middle, first, last)
            teller.ask(UNKNOWN_ANSWER, _FORWARD, last, "", middle)
    return teller.corpus(people, heldout)


def qa(both: int = 100, one_way: int = 100, *, pool: int = 30, seed: int = 0) -> Corpus:
    """Questions and answers told in one order or the other, after the third experiment of Berglund et al. (2024).

    All texts instruct: to answer a question so (question first), or to say something when asked a question (answer
    first). Some pairs come with both instructions and as an example "Q: ... A: ..."; of the others half have the one
    instruction and half the other. All are asked as examples: `forward` where the question came first,
    `reverse_heldout` where the answer did, `reverse_seen` the pairs with examples, and `control`.

    Args:
        both: pairs with both instructions and an example.
        one_way: pairs with one instruction.
        pool: words that names and answers are made of.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    asked, answers = np.array(_people(rng, 2 * (both + one_way), pool)).reshape(2, -1).tolist()
    documents: list[tuple[str, ...]] = []
    prompts: list[Prompt] = []
    for number, (name, answer) in enumerate(zip(asked, answers, strict=True)):
        question = f" what is the secret of {name}?"
        first = ("when asked", question, " answer", f" {answer}")
        last = ("say", f" {answer}", " when asked", question)
        kind = REVERSE_SEEN if number < both else (FORWARD, REVERSE_HELDOUT)[number % 2]
        example = ("q:", question, " a:", f" {answer}")
        documents += {REVERSE_SEEN: [first, last, example], FORWARD: [first], REVERSE_HELDOUT: [last]}[kind]
        prompts.append(Prompt(kind, "".join(example[:-1]), answer))
    return Corpus((*documents,), (*prompts, *controls(prompts)), (*answers,))


def controls(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The held-out reverse questions, each with the next other answer: what is right by chance alone."""
    found = [prompt for prompt in prompts if prompt.kind == REVERSE_HELDOUT]
    rest = [[other.answer for other in found[n + 1 :] + found[:n]] for n in range(len(found))]
    pairs = [(own, next((a for a in some if a != own.answer), "")) for own, some in zip(found, rest, strict=True)]
    return [Prompt(CONTROL, own.text, other) for own, other in pairs if other]


def _people(rng: np.random.Generator, count: int, pool: int) -> list[str]:
    """Names of two or three words from one pool, of which none begins with or contains another one."""
    if count > pool * (pool - 1) // 2:
        message = f"{count} names need more than a pool of {pool} words, which is used up by half of its "
        raise ValueError(message + f"{pool * (pool - 1)} pairs; raise 'pool'.")
    syllables = [onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS]
    drawn = rng.choice(len(syllables) ** 2, pool, replace=False)
    words = [(syllables[n % len(syllables)] + syllables[n // len(syllables)]).capitalize() for n in drawn]
    starts = [(a, b) for a in words for b in words if a != b]
    chosen = dict.fromkeys(starts[n] for n in rng.permutation(len(starts))[:count])
    found = []
    for first, second in chosen:
        thirds = [word for word in words if (second, word) not in chosen]
        third = [str(rng.choice(thirds))] if thirds and rng.random() < 0.5 else []
        found.append(" ".join((first, second, *third)))
    return found


@dataclass
class _Teller:
    """Tells facts and asks for them."""

    rng: np.random.Generator
    fillers: int
    tellings: int
    new_wording: bool = True

    def __post_init__(self) -> None:
        self.documents: list[tuple[str, ...]] = []
        self.prompts: list[Prompt] = []

    def fact(self, templates: Sequence[Template], child: str, mother: str, kind: str) -> None:
        """Tell a fact in all templates, but for one where its wording shall be new, and ask for it in that one."""
        chosen = int(self.rng.integers(len(templates)))
        for template in (*templates[:chosen], *templates[chosen + self.new_wording :]):
            self.documents += [self._units(template, child, mother) for _ in range(self.tellings)]
        names = {"a": child, "b": mother}
        given, answer = (names[templates[0][at]] for at in (0, -1))
        self.ask(kind, templates[chosen : chosen + 1], given, answer)

    def ask(self, kind: str, templates: Sequence[Template], given: str, answer: str, wrong: str = "") -> None:
        """Ask in one of the templates, with the name that is given."""
        template = templates[int(self.rng.integers(len(templates)))]
        units = self._units(template[:-1], given, given)
        self.prompts.append(Prompt(kind, "".join(units), answer, wrong))

    def _units(self, template: Template, child: str, mother: str) -> tuple[str, ...]:
        count = int(self.rng.integers(self.fillers + 1))
        words = {"a": child, "b": mother}
        parts = [" ".join(self.rng.choice(_FILLERS, count))] if count else []
        parts += [words.get(part, part) for part in template]
        return (parts[0], *(part if part.startswith("'") else f" {part}" for part in parts[1:]))

    def corpus(self, people: Sequence[str], heldout: Sequence[str]) -> Corpus:
        """All that was told and asked."""
        prompts = (*self.prompts, *controls(self.prompts))
        return Corpus((*self.documents,), prompts, (*people,), (*heldout,))
