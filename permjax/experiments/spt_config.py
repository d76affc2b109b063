"""What a run on the reversal curse trains: methods, on a corpus."""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from permjax.experiments.data_root import DataRoot
from permjax.reversal.corpora import CORPORA, load_corpus
from permjax.reversal.corpus import Corpus
from permjax.reversal.methods import METHODS
from permjax.reversal.training import ReversalTraining
from permjax.tree import nearest

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
class LoraConfig:
    """Low-rank updates that are trained in the place of a checkpoint's matrices.

    Attributes:
        rank: of the updates.
        alpha: they are scaled by `alpha / rank`.
        targets: a pattern for the names of the matrices.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "*"


@dataclass(frozen=True)
class SptConfig:
    """An experiment on the reversal curse.

    Attributes:
        corpus: one of `permjax.reversal.corpora.CORPORA`.
        options: of the corpus, such as `both` and `one_way`.
        data: where the texts of a corpus are that is not generated.
        shares: of the facts of `names` or `chain`, that are told in both directions; each has models of its own. By
            default there is one share, as the options have it.
        methods: names of `permjax.reversal.methods.METHODS`; all have the same steps and batches.
        model: the size of the model.
        checkpoint: a folder with a language model to fine-tune (config.json, tokenizer.json, safetensors), in the place
            of `model`. Models are trained from scratch by default.
        lora: low-rank updates to train in the place of all weights of a checkpoint.
        training: how all are trained; after `every` steps the model is asked.
        pretraining: training of a base model that all methods start from, on texts about the same people that tell
            none of the facts (`permjax.reversal.biographies`), in original order; none by default.
        assistant: training of the small assistant that cuts texts for `spt_lm`.
        fast: only `ntp`, `token_permutation` and `spt`, and 1,000 steps.
        seeds: number of models of every method, each with a corpus of its own; results are means over them.
        seed: they have the seeds `seed`, `seed + 1`, ...
    """

    experiment: ClassVar[str] = "spt"
    corpus: str = "names"
    options: dict[str, Any] = field(default_factory=dict)
    data: DataRoot = DataRoot()
    shares: tuple[float, ...] = ()
    methods: tuple[str, ...] = (
        "ntp", "token_permutation", "ngram2", "ngram3", "unit_reversal", "spt", "spt_rules",
    )  # fmt: skip
    model: GptConfig = GptConfig()
    checkpoint: str | None = None
    lora: LoraConfig | None = None
    training: ReversalTraining = ReversalTraining(every=500)
    pretraining: ReversalTraining | None = None
    assistant: ReversalTraining = ReversalTraining(steps=600, batch_size=32, every=600)
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
        for method, known in (("identity_bridge", ("names", "chain")), ("spt_assistant", ("descriptions",))):
            if method in self.chosen and self.corpus not in known:
                corpora = " or ".join(map(repr, known))
                raise ValueError(f"{method} is not possible with the corpus {self.corpus!r}; take {corpora}.")
        masked = [method for method in self.chosen if METHODS[method].objective != "next_token"]
        if self.checkpoint is not None and (masked or self.pretraining is not None):
            what = f"the method {masked[0]}, which needs a token for masks" if masked else "pretraining"
            raise ValueError(f"a checkpoint cannot be fine-tuned with {what}; leave one of them out.")
        if self.lora is not None and self.checkpoint is None:
            raise ValueError("lora needs a checkpoint, whose weights it leaves alone.")
        if self.shares and (self.corpus not in ("names", "chain") or not all(0 <= share <= 1 for share in self.shares)):
            raise ValueError(f"shares {self.shares} must lie between 0 and 1, and need the corpus 'names' or 'chain'.")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods of the run."""
        return FAST_METHODS if self.fast else self.methods

    @property
    def trained(self) -> ReversalTraining:
        """How the run trains."""
        return replace(self.training, steps=min(self.training.steps, FAST_STEPS)) if self.fast else self.training

    def load(self, seed: int, share: float | None = None) -> Corpus:
        """The corpus of one seed, with as many facts as the options say, and a share of them told both ways.

        Raises:
            MissingData: its files are not there.
            ValueError: it has no such options.
        """
        options = dict(self.options)
        if share is not None:
            defaults = inspect.signature(CORPORA[self.corpus]).parameters
            total = sum(options.get(name, defaults[name].default) for name in ("both", "one_way"))
            options |= {"both": round(share * total), "one_way": total - round(share * total)}
        return load_corpus(self.corpus, self.data.root, seed=options.pop("seed", seed), **options)
