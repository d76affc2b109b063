"""What the command that edits facts takes."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Method: TypeAlias = Literal["rome", "c_rome", "memit", "alphaedit", "ft_l"]


@dataclass(frozen=True)
class EditOptions:
    """What to edit, and how.

    Attributes:
        model: a GPT-2 or Llama-like model: a folder with config.json, tokenizer.json and safetensors.
        edits: the facts: a record in each line, or a JSON list of them, of CounterFact, zsRE or EasyEdit, or with the
            keys prompt, subject and target.
        out: a folder for the edited model, its tokenizer, delta.safetensors and a report.
        method: the editor; with the settings of its paper for models of its sizes, else with settings relative to the
            model's own.
        skip_bad: go on without the records that are no edits, and report them; by default the first one is refused.
        layer: which layer to edit, from 0; for memit and alphaedit the last of some.
        settings: a hyper-parameter of the method, as in value.clamp=2.
        batch: how many edits are written together; one after the other by default.
        fallback: where the guard refuses an edit by rome, try c_rome, then memit.
        text: what the model has to keep saying: second moments of keys are collected from it. A file with a sentence in
            each line, or a JSON list of records with Corpus and Text; may be given several times. By default the model
            writes some text itself. No sentence of it may be in the text of the guard.
        identity: take the identity in place of second moments; it is never taken unasked.
        ridge: of rome, c_rome and memit: added to the diagonal of second moments as a share of its mean, so that little
            text does; the papers have 0.
        guard: refuse edits of which this text shows that they break the model, with exit status 3 if none is left; as
            for text. Without it only weights that are not finite are refused.
        guard_limit: the largest perplexity of a file or corpus after all edits, as a multiple of that of the model.
        guard_each: the same after one edit, as a multiple of that just before it.
        guard_energy: how much one edit may change what its layer says on this text, as a share of it; any by default.
        guard_sentences: of each file or corpus, at most.
        seed: of prefixes, and of text that the model writes.
    """

    model: str
    edits: str
    out: str
    method: Method = "rome"
    skip_bad: bool = False
    layer: int | None = None
    settings: tuple[str, ...] = ()
    batch: int = 1
    fallback: bool = True
    text: tuple[str, ...] = ()
    identity: bool = False
    ridge: float = 1e-3
    guard: tuple[str, ...] = ()
    guard_limit: float = 1.5
    guard_each: float = 1.05
    guard_energy: float | None = None
    guard_sentences: int = 64
    seed: int = 0
