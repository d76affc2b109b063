"""What a run on the reversal curse trains: methods, on a generated corpus."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar

from permjax.reversal.corpus import Corpus, chain, names, qa
from permjax.reversal.methods import METHODS
from permjax.reversal.training import ReversalTraining
from permjax.tree import nearest

CORPORA: Mapping[str, Callable[..., Corpus]] = MappingProxyType({"names": names, "chain": chain, "qa": qa})
"""Generated corpora by name."""

FAST_METHODS = ("ntp", "token_permutation", "spt")
FAST_STEPS = 1000


@dataclass(frozen=True)
class GptConfig:
    """The size of the model, which is trained from scratch.

    Attributes:
        width: of the residual stream.
        layers: number of blocks.
        heads: of attention, in each block.
    """

    width: int = 128
    layers: int = 2
    heads: int = 4


@dataclass(frozen=True)
class SptConfig:
    """An experiment on the reversal curse.

    Attributes:
        corpus: one of `CORPORA`.
        options: of the corpus, such as `both` and `one_way`.
        methods: names of `permjax.reversal.methods.METHODS`; all have the same steps and batches.
        model: the size of the model.
        training: how all are trained; after `every` steps the model is asked.
        fast: only `ntp`, `token_permutation` and `spt`, and 1,000 steps.
        seeds: number of models of every method, each with a corpus of its own; results are means over them.
        seed: they have the seeds `seed`, `seed + 1`, ...
    """

    experiment: ClassVar[str] = "spt"
    corpus: str = "names"
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = (
        "ntp", "token_permutation", "ngram2", "ngram3", "unit_reversal", "spt", "spt_rules",
    )  # fmt: skip
    model: GptConfig = GptConfig()
    training: ReversalTraining = ReversalTraining(every=500)
    fast: bool = False
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name, known in ((self.corpus, CORPORA), *((method, METHODS) for method in self.methods)):
            if name not in known:
                message = f"there is no corpus or method {name!r}{nearest(name, known)}; known are {', '.join(known)}."
                raise ValueError(message)
        if not self.methods or len({*self.methods}) < len(self.methods) or self.seeds < 1:
            raise ValueError("methods must be one or more, each once, and seeds at least 1.")
        if self.corpus == "qa" and "identity_bridge" in self.chosen:
            raise ValueError("identity_bridge needs facts with a relation; take the corpus 'names' or 'chain'.")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods of the run."""
        return FAST_METHODS if self.fast else self.methods

    @property
    def trained(self) -> ReversalTraining:
        """How the run trains."""
        return replace(self.training, steps=min(self.training.steps, FAST_STEPS)) if self.fast else self.training

    def load(self, seed: int) -> Corpus:
        """The corpus of one seed."""
        return CORPORA[self.corpus](**{"seed": seed} | self.options)
