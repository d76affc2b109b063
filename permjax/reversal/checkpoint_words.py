"""The tokens of a checkpoint's tokenizer, as corpora and questions need them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from permjax.io.tokenizers import FileTokenizer
from permjax.reversal.tokens import encoder, needs_prefix_space, with_prefix_space
from permjax.reversal.vocabulary import Special


@dataclass(frozen=True)
class CheckpointWords:
    """The tokens of a checkpoint. Where words at the start of a text are written otherwise, texts get a space first.

    Attributes:
        tokenizer: that of the checkpoint.
        special: its tokens that are no words; without masks and tags.
    """

    tokenizer: FileTokenizer
    special: Special
    _spaced: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Find out whether texts need a space before them."""
        object.__setattr__(self, "_spaced", needs_prefix_space(encoder(self.tokenizer.inner)))

    def __call__(self, text: str) -> tuple[Sequence[int], Sequence[Sequence[int]]]:
        """The tokens of a text, and the characters of each in the text as it was given."""
        given = with_prefix_space(text) if self._spaced else text
        ids, offsets = encoder(self.tokenizer.inner)(given)
        shift = len(given) - len(text)
        return ids, [(max(0, start - shift), max(0, end - shift)) for start, end in offsets]

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return list(self(text)[0])


def special_of(config: Mapping[str, Any]) -> Special:
    """The tokens around a text that a `config.json` names; where only one is named it stands on both sides.

    Raises:
        ValueError: it names neither `bos_token_id` nor `eos_token_id`.
    """
    begin, end = (_first(config.get(key)) for key in ("bos_token_id", "eos_token_id"))
    if begin is None and end is None:
        message = "The configuration names neither 'bos_token_id' nor 'eos_token_id'; "
        raise ValueError(message + "add the token that stands between texts.")
    begin, end = (end if begin is None else begin), (begin if end is None else end)
    return Special(int(begin or 0), int(end or 0), int(end or 0))


def _first(value: Any) -> Any:
    """A token, or the first of several."""
    return value[0] if isinstance(value, list) and value else value
