"""From a request to arrays of fixed shape: rows of tokens, where the subject ends, and what is to be predicted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from permjax.edit.requests import SLOT, EditRequest
from permjax.io.tokenizers import Encoding, Tokenizer

_ESSENCE = "{} is a"
_MULTIPLE = 8  # of which `prepare_all` makes the length of rows, so that other requests compile to the same program


class Scored(NamedTuple):
    """Texts with the answers that are to be predicted, padded on the right with token 0.

    Attributes:
        tokens: the tokens of prompt and answer.
        targets: the token that a position has to predict, where that is one of the answer; -1 elsewhere.
        lengths: the number of tokens of each row before the padding.
    """

    tokens: Int[np.ndarray, "rows t"]
    targets: Int[np.ndarray, "rows t"]
    lengths: Int[np.ndarray, " rows"]


class PreparedEdit(NamedTuple):
    """One request as the editors take it; row 0 is the bare prompt, the others have a prefix before it.

    Attributes:
        tokens: the tokens of prefix, prompt and target, padded on the right with token 0.
        subject: the position of the subject's last token in each row.
        targets: the token that a position has to predict, where that is one of the target; -1 elsewhere.
        lengths: the number of tokens of each row before the padding.
        kl_tokens: the tokens of a sentence about the subject in which its essence is to stay, padded as the others.
        kl_subject: the position of the subject's last token in it.
    """

    tokens: Int[np.ndarray, "rows t"]
    subject: Int[np.ndarray, " rows"]
    targets: Int[np.ndarray, "rows t"]
    lengths: Int[np.ndarray, " rows"]
    kl_tokens: Int[np.ndarray, " t"]
    kl_subject: Int[np.ndarray, ""]


def prepare(
    request: EditRequest, tokenizer: Tokenizer, *, prefixes: Sequence[str], pad_to: int, essence: str = _ESSENCE
) -> PreparedEdit:
    """The arrays of a request.

    The target is joined to the prompt by a space unless one of them has it, and a text is tokenized as a whole, so that
    the rows are what the model meets in running text.

    Args:
        request: the fact.
        tokenizer: that of the model.
        prefixes: texts that stand before the prompt in the rows after the first.
        pad_to: the length t of every row, at most the positions of the model.
        essence: a sentence with a slot for the subject.

    Raises:
        ValueError: a row has more tokens than `pad_to`, or the tokens of prompt and target cannot be told apart.
    """
    texts = [_after(prefix, request.text) for prefix in ("", *prefixes)]
    encodings = [_encoding(tokenizer, _answered(text, request.target)) for text in texts]
    ends = [len(text) - len(request.text) + request.subject_end for text in texts]
    about = EditRequest(essence, request.subject, request.target)
    sentence = _encoding(tokenizer, about.text)
    rows = _padded(encodings, texts, pad_to)
    return PreparedEdit(
        tokens=rows.tokens,
        subject=np.asarray([_last_token(*row) for row in zip(encodings, texts, ends, strict=True)], np.int32),
        targets=rows.targets,
        lengths=rows.lengths,
        kl_tokens=_pad(sentence.ids, 0, pad_to),
        kl_subject=np.asarray(_last_token(sentence, about.text, about.subject_end), np.int32),
    )


def prepare_all(
    requests: Sequence[EditRequest],
    tokenizer: Tokenizer,
    *,
    prefixes: Sequence[str],
    pad_to: int | None = None,
    essence: str = _ESSENCE,
) -> list[PreparedEdit]:
    """The arrays of several requests, all of one shape: see `prepare`.

    Args:
        requests: the facts.
        tokenizer: that of the model.
        prefixes: texts that stand before the prompt.
        pad_to: the length of rows; by default the least multiple of 8 that holds them all.
        essence: a sentence with a slot for the subject.
    """
    if pad_to is None:
        texts = [_answered(_after(prefix, one.text), one.target) for one in requests for prefix in ("", *prefixes)]
        texts += [essence.replace(SLOT, one.subject) for one in requests]
        longest = max(len(_encoding(tokenizer, text).ids) for text in texts)
        pad_to = -(-longest // _MULTIPLE) * _MULTIPLE
    return [prepare(one, tokenizer, prefixes=prefixes, pad_to=pad_to, essence=essence) for one in requests]


def scored(texts: Sequence[str], targets: Sequence[str], tokenizer: Tokenizer, *, pad_to: int) -> Scored:
    """Any prompts with the answers that are to be predicted after them.

    Args:
        texts: prompts, each ends where its answer begins.
        targets: the answer of each.
        tokenizer: that of the model.
        pad_to: the length t of every row.

    Raises:
        ValueError: a row has more tokens than `pad_to`, or the tokens of prompt and target cannot be told apart.
    """
    encodings = [_encoding(tokenizer, _answered(*pair)) for pair in zip(texts, targets, strict=True)]
    return _padded(encodings, texts, pad_to)


def _after(prefix: str, text: str) -> str:
    return f"{prefix} {text}" if prefix else text


def _answered(text: str, target: str) -> str:
    gap = "" if text[-1:].isspace() or target[:1].isspace() else " "
    return f"{text}{gap}{target}"


def _encoding(tokenizer: Tokenizer, text: str) -> Encoding:
    """The tokens of a text without what a tokenizer adds behind it, such as a token for its end."""
    ids, offsets = tokenizer.encode(text)
    count = 1 + max((place for place, (_, last) in enumerate(offsets) if last > 0), default=-1)
    return Encoding(tuple(ids[:count]), tuple(offsets[:count]))


def _padded(encodings: Sequence[Encoding], prompts: Sequence[str], pad_to: int) -> Scored:
    """Rows of tokens with the targets, which are the tokens after the prompts."""
    starts = [_first_target(encoding, prompt) for encoding, prompt in zip(encodings, prompts, strict=True)]
    targets = [[-1] * (n - 1) + list(encoding.ids[n:]) for encoding, n in zip(encodings, starts, strict=True)]
    return Scored(
        np.stack([_pad(encoding.ids, 0, pad_to) for encoding in encodings]),
        np.stack([_pad(row, -1, pad_to) for row in targets]),
        np.asarray([len(encoding.ids) for encoding in encodings], np.int32),
    )


def _pad(ids: Sequence[int], fill: int, length: int) -> Int[np.ndarray, " t"]:
    if len(ids) > length:
        message = f"A row has {len(ids)} tokens, but rows of {length} were asked for; "
        raise ValueError(message + "allow longer rows (`pad_to`), or shorten the prefixes.")
    return np.asarray([*ids, *[fill] * (length - len(ids))], np.int32)


def _last_token(encoding: Encoding, text: str, end: int) -> int:
    """The last token that has a part in the character before `end`."""
    places = [place for place, (first, last) in enumerate(encoding.offsets) if first < end <= last]
    if not places:
        message = f"The tokenizer has no token for the end of the subject in {text[:end]!r}; "
        raise ValueError(message + "write the subject in characters that it knows.")
    return places[-1]


def _first_target(encoding: Encoding, prompt: str) -> int:
    """The first token with characters after the prompt."""
    end = len(prompt.rstrip())
    places = [place for place, (_, last) in enumerate(encoding.offsets) if last > end]
    if not places or places[0] == 0 or encoding.offsets[places[0]][0] < end:
        message = f"The tokens do not tell the prompt {prompt!r} from the target after it; "
        raise ValueError(message + "end the prompt with a whole word.")
    return places[0]
