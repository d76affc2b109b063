"""What can be set of an experiment on the edits of a checkpoint."""

from dataclasses import dataclass
from typing import ClassVar

from permjax.experiments.collapse_editors import check_editors
from permjax.merge.perplexity import Convention


@dataclass(frozen=True)
class EditHfConfig:
    """Single edits and a sequence of edits of a model in files.

    Files of text have a sentence in each line, or are a JSON list of records with Corpus and Text, as ME-PPL has them.
    Where none is given, the model writes the text itself; no two of the three texts may share a sentence.

    Attributes:
        checkpoint: a GPT-2 or Llama-like model: a folder with config.json, tokenizer.json and safetensors.
        edits: a file of facts: records of CounterFact, zsRE or EasyEdit, or with the keys prompt, subject and target.
            By default they are made from templates: hard edits, and a control for each.
        skip_bad: go on without the records of the file that are no edits.
        mine: take the hard edits of the file, with a control for each; otherwise its first edits as they are.
        most: hard edits, and as many controls; or edits of the file.
        editors: which of them to run, with the settings of their papers for models of their sizes, else with settings
            relative to the model's own. The guarded sequence tries them in this order for each edit.
        layer: where they write, or the last of their layers; that of their settings by default.
        steps: of every search for a value, at most.
        prefixes: before a prompt, of every length that an editor asks for, at most; fewer are quicker.
        text: what second moments of keys are collected from.
        identity: take the identity in the place of second moments.
        ridge: added to the diagonal of second moments as a share of its mean; the papers have 0.
        probe: what perplexity is measured on.
        sentences: of each corpus of it, at most, or written by the model.
        convention: of perplexity; the default is that of ME-PPL.
        sequence: how many of the (hard) edits are also made one after the other, as far as there are; 0 for none.
        every: measure perplexity after so many of them.
        guard: what the guard of a sequence looks at.
        guard_each: the largest perplexity of a corpus after one edit, as a multiple of that just before it.
        guard_limit: the same after all edits, as a multiple of that of the model.
        guard_sentences: of each corpus, at most, or written by the model.
        chunk: how many edits are computed side by side: more take more memory, and pay on an accelerator.
        seed: of templates, prefixes and text that the model writes.
    """

    experiment: ClassVar[str] = "edit_hf"
    checkpoint: str = "gpt2"
    edits: str | None = None
    skip_bad: bool = False
    mine: bool = True
    most: int = 24
    editors: tuple[str, ...] = ("rome", "c_rome", "memit")
    layer: int | None = None
    steps: int | None = None
    prefixes: int | None = None
    text: tuple[str, ...] = ()
    identity: bool = False
    ridge: float = 1e-3
    probe: tuple[str, ...] = ()
    sentences: int = 50
    convention: Convention = "sentence_mean"
    sequence: int = 10
    every: int = 5
    guard: tuple[str, ...] = ()
    guard_each: float = 1.05
    guard_limit: float = 1.5
    guard_sentences: int = 32
    chunk: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        check_editors(self.editors)
        for name in ("most", "sentences", "every", "guard_sentences", "chunk", "steps", "prefixes"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if self.sequence < 0:
            raise ValueError(f"sequence must be 0 or more, not {self.sequence}.")
        if self.identity and (self.text or "alphaedit" in self.editors):
            what = "text is what to collect them from" if self.text else "alphaedit cannot do without them"
            raise ValueError(f"identity takes no second moments, and {what}; leave one of them out.")

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of edits after which perplexity is measured; the last is that of the sequence."""
        return tuple(sorted({*range(self.every, self.sequence, self.every), self.sequence}))
