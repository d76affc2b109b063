"""Hard edits and matched controls for any tokenizer: first names that are one token, in templates."""

from itertools import product
from typing import NamedTuple

import numpy as np

from permjax.edit.hard_cases import HardCases, is_hard
from permjax.edit.requests import EditRequest
from permjax.io.tokenizers import Tokenizer

NAMES = tuple(
    "James John Robert Michael David William Richard Thomas Charles Daniel Matthew Anthony Mark Paul Andrew Joshua "
    "Kevin Brian George Edward Jason Ryan Jacob Eric Adam Peter Henry Frank Simon Martin Mary Anna Emma Sarah Laura "
    "Julia Alice Maria Helen Susan Karen Lisa Nancy Kate Rachel Emily Jessica Amy".split()
)
_NEIGHBOURS = 2


class Template(NamedTuple):
    """A relation: a prompt that begins with the subject, one in which words stand before it, and answers."""

    first: str
    mid: str
    targets: tuple[str, ...]


TEMPLATES = (
    Template(
        "{} was born in the city of",
        "The birthplace of {} is the city of",
        tuple("Paris London Rome Berlin Madrid Vienna Tokyo Chicago Boston Moscow".split()),
    ),
    Template(
        "{} works as a",
        "The job of {} is that of a",
        tuple("doctor lawyer teacher painter singer writer farmer pilot soldier nurse".split()),
    ),
    Template(
        "{} speaks fluent",
        "The first language of {} is",
        tuple("French German Spanish Italian Russian Japanese Chinese Arabic Polish Greek".split()),
    ),
)


def template_cases(tokenizer: Tokenizer, count: int, *, seed: int = 0) -> HardCases:
    """Edits whose subject is one token at the start of the prompt, each with a control that says the same.

    A control has the subject and the target of its hard edit, and words before the subject. The other prompt is the
    paraphrase of each. What is told is not known of anybody: the model has nothing to unlearn.

    Args:
        tokenizer: that of the model.
        count: of hard edits, at most; there are three for every name that is one token.
        seed: of names, relations and targets.

    Raises:
        ValueError: no name is one token.

    Source:
        Yang et al., "The Butterfly Effect of Model Editing", Findings of ACL 2024, whose HardEdit was written by a
        language model after what hard cases have in common; this set is made of templates.
    """
    names = [name for name in NAMES if is_hard(EditRequest(TEMPLATES[0].first, name, "x"), tokenizer)]
    if not names:
        message = f"None of {len(NAMES)} first names is one token of the tokenizer, so that templates make no hard "
        raise ValueError(message + "edits; give a file of edits.")
    rng = np.random.default_rng(seed)
    pairs = [*product(names, TEMPLATES)]
    chosen = [(*pairs[i], int(rng.integers(1 << 30))) for i in rng.permutation(len(pairs))[:count]]
    hard = [_request(template.first, template.mid, name, template, draw) for name, template, draw in chosen]
    return HardCases(hard, [_request(t.mid, t.first, name, t, draw) for name, t, draw in chosen])


def _request(prompt: str, other: str, name: str, template: Template, draw: int) -> EditRequest:
    place = NAMES.index(name)
    return EditRequest(
        prompt,
        name,
        template.targets[draw % len(template.targets)],
        paraphrases=(other.format(name),),
        neighbours=tuple(prompt.format(NAMES[(place + step) % len(NAMES)]) for step in range(1, _NEIGHBOURS + 1)),
    )
