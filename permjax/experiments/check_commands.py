"""The command that checks a language model on text, by itself or against the model that it was made from."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from tyro.conf import Positional, UseAppendAction, arg

from permjax import tree
from permjax.experiments.architectures import FilesError, find_architecture
from permjax.experiments.guard_files import Refused, on_device, read_probe
from permjax.experiments.runs import Finished, read_metrics
from permjax.io.checkpoint import Checkpoint, open_checkpoint
from permjax.merge.energy import input_moments
from permjax.merge.guard import GuardReport, check_change, excesses
from permjax.merge.guard_limits import Limits, Signal
from permjax.merge.perplexity import (
    CONVENTIONS,
    Convention,
    Losses,
    Probe,
    group_losses,
    joined,
    perplexity_of,
)
from permjax.report import Outcome, Table, write_report

_FILE = arg(metavar="FILE")
_KINDS = ("ratio", "kl", "energy")
_LAYERS = 20  # rows of a table


@dataclass(frozen=True)
class Check:
    """What to check.

    Attributes:
        model: a checkpoint of a language model: a safetensors file, an index, or a folder.
        text: a file with a sentence in each line, or a JSON list of records with Corpus and Text, as ME-PPL has them;
            may be given several times.
        against: the model that it was made from; the check fails, with exit status 3, if the model is much worse.
        limit: the largest perplexity of a file or corpus, as a multiple of that of the model `against`.
        sentences: of each file or corpus, at most.
        tokenizer: a `tokenizer.json`; the one beside the model by default.
        config: a JSON file with `model_type` and its fields; the `config.json` beside the model by default.
        out: also write a report to this folder.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    text: Annotated[UseAppendAction[tuple[str, ...]], _FILE]
    against: Annotated[str | None, arg(metavar="BASE")] = None
    limit: Annotated[float, arg(metavar="FLOAT")] = 1.5
    sentences: Annotated[int, arg(metavar="INT")] = 64
    tokenizer: Annotated[str | None, _FILE] = None
    config: Annotated[str | None, _FILE] = None
    out: Annotated[str | None, arg(aliases=("-o",), metavar="DIR")] = None


def run(given: Check, command: str) -> tuple[Outcome, Finished | None]:
    """Check a model and tell what was found; with a report where it is asked for.

    Raises:
        ValueError: files that do not fit; names them.
        GuardRefusedError: the model is much worse than the one it was made from, or not finite.
    """
    begin = time.perf_counter()
    outcome, refused = check(given)
    finished = None
    if given.out is not None:
        folder = Path(given.out)
        write_report(outcome, folder, given, command=command, seconds=time.perf_counter() - begin)
        finished = Finished(folder, read_metrics(folder))
    if refused:
        raise Refused(f"The guard refuses {given.model}: {refused}.", outcome)
    return outcome, finished


def check(given: Check) -> tuple[Outcome, str]:
    """Measure a model, and tell what is worst about it if that is too much.

    Raises:
        ValueError: files or options that do not fit.
    """
    if not (given.limit > 0 and given.sentences > 0):
        raise FilesError(f"--limit and --sentences must be above 0, not {given.limit} and {given.sentences}.")
    if not given.text:
        raise FilesError("There is no text to check the model on; name a file with --text FILE.")
    checkpoints = [open_checkpoint(path) for path in (given.model, given.against) if path is not None]
    architecture = find_architecture(checkpoints, given.config, None)
    probe = read_probe(given.text, architecture, checkpoints[0], given.tokenizer, given.sentences)
    model, *base = (_params(checkpoint, architecture.like) for checkpoint in checkpoints)
    losses = group_losses(architecture.apply, model, probe)
    seen = _Seen(losses, _compared(architecture.apply, base[0], model, probe) if base else None)
    refused = _excess(seen, given.limit)
    return _outcome(given, seen, refused), refused


class _Seen(NamedTuple):
    losses: dict[str, Losses]
    report: GuardReport | None

    def perplexity(self, corpus: str, convention: Convention) -> float:
        return float(perplexity_of(self.losses[corpus], convention))

    def overall(self, convention: Convention) -> float:
        return float(perplexity_of(joined([*self.losses.values()]), convention))


def _params(checkpoint: Checkpoint, like: Any) -> Any:
    return tree.map_named(lambda name, _: on_device(checkpoint[name].read()), like)


def _compared(apply: Callable[..., Any], base: Any, model: Any, probe: Probe) -> GuardReport:
    """What changed from the base to the model, layers being given what this text makes of their inputs in the base."""
    moments = input_moments(apply, base, [batch for batches in probe.values() for batch in batches])
    return jax.device_get(check_change(apply, base, model, probe, moments=moments))


def _excess(seen: _Seen, limit: float) -> str:
    """What is worst of what is too much, or nothing."""
    if seen.report is not None and (found := excesses(seen.report, Limits(perplexity=limit))):
        return str(found[0])
    finite = all(np.isfinite(seen.perplexity(corpus, "token")) for corpus in seen.losses)
    return "" if finite else "its perplexity is not finite"


# what is told


def _outcome(given: Check, seen: _Seen, refused: str) -> Outcome:
    metrics: dict[str, Any] = {"verdict": "refused" if refused else "accepted"}
    metrics |= {f"ppl_{convention}": seen.overall(convention) for convention in CONVENTIONS}
    summary = f"{given.model} has a perplexity of {metrics['ppl_token']:.4g} per token on this text."
    tables = [_perplexities(seen)]
    if seen.report is not None:
        numbers = _numbers(seen.report)
        worst = {kind: float(np.max([value for (of, _), value in numbers if of == kind])) for kind in _KINDS}
        metrics |= {f"{kind}_worst": value for kind, value in worst.items()}
        summary += f" On the worst corpus it is {worst['ratio']:.4g} times that of {given.against}."
        tables.append(_energies(seen.report))
    summary += f" Too much: {refused}." if refused else ""
    return Outcome(f"{given.model} checked", summary, metrics, tuple(tables))


def _numbers(report: GuardReport) -> list[tuple[Signal, float]]:
    """All signals; perplexities are ratios."""
    ratio = {"perplexity": "ratio"}
    return [((ratio.get(kind, kind), name), float(value)) for (kind, name), value in report.signals().items()]


def _perplexities(seen: _Seen) -> Table:
    """Perplexities by corpus, with what they were before."""
    columns = ("corpus", "sentences", *(convention.replace("_", " ") for convention in CONVENTIONS))
    rows = {
        corpus: (corpus, int((losses.predicted > 0).sum()), *(seen.perplexity(corpus, how) for how in CONVENTIONS))
        for corpus, losses in seen.losses.items()
    }
    caption = "By three conventions: the mean of exp over sentences, per foretold token, and per token of the input."
    if seen.report is not None:
        signals = dict(_numbers(seen.report))
        columns += ("before", "ratio", "KL")
        for name, group in seen.report.groups.items():
            rows[name] += (float(group.before), signals["ratio", name], signals["kl", name])
        caption += " Before, ratio: of the mean over sentences. KL: of the predictions from those before, in nats."
    return Table("Perplexity", columns, tuple(rows.values()), caption)


def _energies(report: GuardReport) -> Table:
    """The layers whose outputs changed most."""
    largest = sorted(report.energy.items(), key=lambda item: -np.nan_to_num(item[1], nan=np.inf))[:_LAYERS]
    caption = "What the change adds to the outputs of a layer, relative to them: root mean squares. The largest first."
    return Table("Energy of the change", ("leaf", "energy"), tuple((n, float(x)) for n, x in largest), caption)
