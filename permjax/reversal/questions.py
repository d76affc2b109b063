"""Questions as rows of tokens, in the form in which a model was trained."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from permjax.reversal.corpus import Prompt
from permjax.reversal.methods import Form
from permjax.reversal.vocabulary import Special, Words, mask_of


class Questions(NamedTuple):
    """Prompts with room for their answers.

    Attributes:
        tokens: the rows, int32 [n, t].
        doc_ids: 0, and -1 where nothing stands, int32 [n, t].
        start: the place of the first token of each answer, int32 [n].
        answers: the tokens that should stand there, -1 after their end, int32 [n, m].
        form: how the model is asked.
    """

    tokens: Int[np.ndarray, "n t"]
    doc_ids: Int[np.ndarray, "n t"]
    start: Int[np.ndarray, " n"]
    answers: Int[np.ndarray, "n m"]
    form: Form

    @property
    def known(self) -> Bool[np.ndarray, "n m"]:
        """Where an answer has a token."""
        return self.answers >= 0


def lay_out(
    prompts: Sequence[Prompt],
    words: Words,
    form: Form = "causal",
    *,
    tagged: bool = True,
    length: int | None = None,
) -> Questions:
    """Prompts as rows: in original order, with its tag, as documents of `token_documents` are.

    A masked text has as many masks as its answer has tokens, or one where there is no answer; a copy comes after the
    same text with masks.

    Args:
        prompts: at least one.
        words: of the model.
        form: `causal`, `masked` or `copy`.
        tagged: whether texts begin with the tag of their order, where there are tags.
        length: tokens of a row; as many as are needed by default.

    Raises:
        ValueError: a row is too short.
    """
    special = words.special
    begin = special.original if tagged else special.begin
    answers = [words.ids(prompt.answer)[: prompt.most] for prompt in prompts]
    rows, starts = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        row, start = _row([begin, *words.ids(prompt.text)], max(len(answer), 1), form, special)
        rows.append(row)
        starts.append(start)
    room = max(1, *map(len, answers))
    needed = max(max(start + room, len(row)) for row, start in zip(rows, starts, strict=True))
    if length is not None and length < needed:
        raise ValueError(f"The questions need rows of {needed} tokens, not of {length}; make them longer.")
    tokens = _padded(rows, needed if length is None else length, special.pad)
    doc_ids = _padded([[0] * len(row) for row in rows], tokens.shape[1], -1)
    if form != "masked":  # a causal model may write on to the end of the row
        doc_ids[:] = 0
    return Questions(tokens, doc_ids, np.array(starts, np.int32), _padded(answers, room, -1), form)


def _row(prompt: list[int], answer: int, form: Form, special: Special) -> tuple[list[int], int]:
    """The tokens of a row, and where its answer starts."""
    if form == "causal":
        return prompt, len(prompt)
    masked = [*prompt, *[mask_of(special)] * answer, special.end]
    return (masked, len(prompt)) if form == "masked" else ([*masked, *prompt], len(masked) + len(prompt))


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Int[np.ndarray, "n t"]:
    found = np.full((len(rows), length), fill, np.int32)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = values
    return found
