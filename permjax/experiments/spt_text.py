"""The price of permuted units: the perplexity of ordinary text in original order, at equal tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from permjax.data.dataset import data_root
from permjax.data.text import invented, read_text
from permjax.experiments.data_root import DataRoot
from permjax.experiments.registry import Experiment
from permjax.experiments.spt_config import GptConfig
from permjax.experiments.spt_report import TITLES
from permjax.report import Curve, Figure, Outcome, Table
from permjax.reversal.corpus import token_documents
from permjax.reversal.evaluate import perplexity
from permjax.reversal.methods import METHODS
from permjax.reversal.prose import Prose, prose
from permjax.reversal.training import ReversalTraining, Rows, rows_of, small_gpt, train
from permjax.tree import nearest


@dataclass(frozen=True)
class SourceConfig:
    """A text.

    Attributes:
        key: what metrics call it.
        path: the file under `data.root`; invented sentences by default.
        characters: how much of it is read; all by default, 300,000 of an invented one.
    """

    key: str = "invented"
    path: str = ""
    characters: int | None = None


@dataclass(frozen=True)
class SptTextConfig:
    """Perplexities of texts in original order after training by several methods.

    Attributes:
        texts: one or more.
        data: where they are.
        methods: those of `permjax.reversal.methods.METHODS` that foretell the next token; units are cut by rules.
        words: how many are known of each text.
        longest: words of a sentence.
        model: its size.
        training: of all; after `every` steps the text for testing is read.
        seeds: number of models.
        seed: the first.
    """

    experiment: ClassVar[str] = "spt_text"
    texts: tuple[SourceConfig, ...] = (SourceConfig(),)
    data: DataRoot = DataRoot()
    methods: tuple[str, ...] = ("ntp", "token_permutation", "unit_reversal", "spt")
    words: int = 4000
    longest: int = 40
    model: GptConfig = GptConfig()
    training: ReversalTraining = ReversalTraining(every=500)
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        causal = [name for name, method in METHODS.items() if method.form == "causal" and not method.bridge]
        for name in self.methods:
            if name not in causal or METHODS[name].cut in ("assistant", "lm"):
                raise ValueError(f"there is no method {name!r} for texts{nearest(name, causal)}; take of {causal}.")
        keys = [one.key for one in self.texts]
        if not keys or not self.methods or len({*keys}) < len(keys) or self.seeds < 1:
            raise ValueError("texts of different keys and methods must be one or more, and seeds at least 1.")


class _Found(NamedTuple):
    """Perplexities by step, one for each seed, and tokens per batch."""

    curves: Mapping[int, list[float]]
    tokens: float


def run(config: SptTextConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment; training keeps its state in `out/state`."""
    found: dict[tuple[str, str], _Found] = {}
    for source in config.texts:
        text = prose(_read(config, source), words=config.words, longest=config.longest)
        for name in config.methods:
            found[source.key, name] = _trained(config, source.key, name, text, out / "state", progress)
    return _report(config, found)


def _read(config: SptTextConfig, source: SourceConfig) -> str:
    if not source.path:
        return invented(config.seed, source.characters or 300_000)
    return read_text(data_root(config.data.root) / source.path)[: source.characters]


def _trained(config: SptTextConfig, key: str, name: str, text: Prose, state: Path, progress: Any) -> _Found:
    documents = [token_documents(part, text.words) for part in (text.train, text.test)]
    length = max(len(document["tokens"]) for part in documents for document in part)
    rows, test = (rows_of(part, length) for part in documents)
    net = small_gpt(
        len(text.words), length, width=config.model.width, layers=config.model.layers, heads=config.model.heads
    )
    curves: dict[int, list[float]] = {}

    def watch(done: int, params: Any) -> None:
        curves.setdefault(done, []).append(perplexity(net, params, dict(test)))
        progress.step(config.training.every, perplexity=f"{curves[done][-1]:.1f}")

    for seed in range(config.seed, config.seed + config.seeds):
        progress.start(f"{name} on {key}, seed {seed}", config.training.steps)
        folder = state / f"{key}-{name}-{seed}"
        params = train(net, rows, METHODS[name], config.training, seed, checkpoint_dir=folder, watch=watch).params
        if len(curves.get(config.training.steps, ())) <= seed - config.seed:  # the run had ended before
            watch(config.training.steps, params)
        progress.done()
    return _Found(curves, _tokens(rows) * config.training.batch_size)


def _tokens(rows: Rows) -> float:
    return float((rows["doc_ids"] >= 0).sum(axis=1).mean())


def _report(config: SptTextConfig, found: Mapping[tuple[str, str], _Found]) -> Outcome:
    last = {pair: one.curves[config.training.steps] for pair, one in found.items()}
    metrics = {f"{name}_text_ppl_{key}": float(np.mean(values)) for (key, name), values in last.items()}
    if len(config.texts) == 1:
        metrics |= {f"{name}_text_ppl": float(np.mean(values)) for (_, name), values in last.items()}
    keys = [one.key for one in config.texts]
    rows = [(TITLES[name], *(_cell(last[key, name]) for key in keys)) for name in config.methods]
    caption = (
        "Perplexity of words in the last tenth of each text, sentence by sentence in original order, after equal steps "
        "and tokens. Words that are not known count as one word."
    )
    return Outcome(
        title="What permuted units cost: perplexity of ordinary text in original order",
        summary=" ".join(_summary(config, found, metrics)),
        metrics=metrics,
        tables=(Table("Perplexity", ("method", *keys), tuple(rows), caption),),
        figures=tuple(_figure(key, config.methods, found) for key in keys),
        headline=tuple(metrics)[: len(config.methods)],
    )


def _summary(config: SptTextConfig, found: Mapping[tuple[str, str], _Found], metrics: Mapping[str, float]) -> list[str]:
    training = config.training
    lines = [
        f"Models trained from scratch by {len(config.methods)} methods, {training.steps:,} steps of "
        f"{training.batch_size} sentences each."
    ]
    for one in config.texts:
        told = ", ".join(f"{metrics[f'{name}_text_ppl_{one.key}']:.1f} {TITLES[name]}" for name in config.methods)
        lines.append(f"{one.key} (about {found[one.key, config.methods[0]].tokens:,.0f} tokens a step): {told}.")
    return lines


def _cell(values: list[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


def _figure(key: str, methods: tuple[str, ...], found: Mapping[tuple[str, str], _Found]) -> Figure:
    curves = []
    for name in methods:
        steps = sorted(found[key, name].curves)
        curves.append(Curve(TITLES[name], steps, [float(np.mean(found[key, name].curves[step])) for step in steps]))
    caption = "In original order, on text that was not trained on."
    return Figure(f"perplexity_{key}", f"Perplexity on {key}", caption, "step", "perplexity", tuple(curves))


EXPERIMENT = Experiment(SptTextConfig, run)
