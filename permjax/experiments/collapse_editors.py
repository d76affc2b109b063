"""The five editors of the collapse experiments, with hyper-parameters that fit small models."""

from dataclasses import dataclass, replace

from permjax.edit.alphaedit import AlphaEdit
from permjax.edit.base import Editor
from permjax.edit.finetune import FtL
from permjax.edit.memit import Memit
from permjax.edit.rome import CRome, Rome
from permjax.edit.values import ValueSettings
from permjax.tree import nearest

TITLES = {"rome": "ROME", "c_rome": "C-ROME", "memit": "MEMIT", "alphaedit": "AlphaEdit", "ft_l": "FT-L"}

_VALUE = ValueSettings(steps=60, learning_rate=0.1, weight_decay=1e-3, relative=True)
_BLOCK = replace(_VALUE, clamp=2.0)


def check_editors(names: tuple[str, ...]) -> None:
    """Refuse names of no editor, and none at all."""
    for name in names:
        if name not in TITLES:
            raise ValueError(f"there is no editor {name!r}{nearest(name, TITLES)}; known are {', '.join(TITLES)}.")
    if not names or len({*names}) < len(names):
        raise ValueError(f"editors must be one or more, each once, not {list(names)}.")


@dataclass(frozen=True)
class EditorsConfig:
    """The hyper-parameters of the editors; layers count from 0."""

    rome: Rome = Rome(1, value=_VALUE)
    c_rome: CRome = CRome(1, value=_VALUE)
    memit: Memit = Memit((0, 1), weight=0.1, relative=True, value=_BLOCK)
    alphaedit: AlphaEdit = AlphaEdit((0, 1), rule="energy", ridge=0.1, relative=True, value=_BLOCK)
    ft_l: FtL = FtL(1, learning_rate=0.05, limit=0.5, relative=True)

    def of(self, name: str) -> Editor:
        """The editor of a name.

        Raises:
            ValueError: there is none.
        """
        check_editors((name,))
        return getattr(self, name)

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that are edited."""
        every = {self.rome.layer, self.c_rome.layer, self.ft_l.layer, *self.memit.layers, *self.alphaedit.layers}
        return tuple(sorted(every))
