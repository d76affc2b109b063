"""What `permjax edit` tells: whether edits took, what they cost, and what was tried and refused."""

import re
from typing import Any

import numpy as np

from permjax.edit.evaluate import Scores
from permjax.experiments.collapse_editors import TITLES
from permjax.experiments.edit_editors import layers_of, published
from permjax.experiments.edit_files import Job
from permjax.experiments.edit_options import EditOptions
from permjax.experiments.edit_steps import Change, Edited
from permjax.merge.guarded import Attempt
from permjax.report import Outcome, Table

_SCORES = {
    "bare": "tokens of the target that are the likeliest, given those before them",
    "prefixed": "the same behind other text",
    "free": "edits whose target the model writes by itself",
    "paraphrase": "as bare, in other words",
    "locality": "other subjects whose next token is as it was",
    "nll": "loss of a token of the target, given those before it",
}
_KEYS = {"paraphrase": "paraphrase", "locality": "locality", "nll": "target_loss"}
_ROWS = 200  # of a table
_PLACE, _TOLD = re.compile(r"(?:line|record) \d+"), 10


def edited_outcome(options: EditOptions, job: Job, edited: Edited) -> Outcome:
    """The metrics, tables and sentences of a run."""
    refused = sum(_size(options, job, one) for one in edited.changes if one.accepted is None)
    count = len(job.requests)
    metrics: dict[str, Any] = {"edits": count, "accepted": count - refused, "refused": refused}
    metrics |= {"skipped": len(job.skipped)} if options.skip_bad else {}
    metrics |= _efficacies(edited)
    worst = {
        (kind, name): float(value) for (kind, name), value in edited.report.signals().items() if kind == "perplexity"
    }
    if worst:
        metrics["ppl_ratio_worst"] = max(worst.values())
    metrics["seconds_per_edit"] = float(np.median([one.seconds for one in edited.changes])) / options.batch
    tables = (_efficacy(edited), *_perplexities(edited), _steps(options, job, edited), _attempts(edited), _skipped(job))
    return Outcome(
        title=f"{count} edits of {options.model} by {TITLES[options.method]}",
        summary=_summary(options, job, metrics),
        metrics=metrics,
        tables=tuple(table for table in tables if table.rows),
        headline=tuple(key for key in ("accepted", "efficacy_bare", "efficacy_free", "locality") if key in metrics),
    )


def _summary(options: EditOptions, job: Job, metrics: dict[str, Any]) -> str:
    places = ", ".join(str(layer) for layer in layers_of({options.method: job.editors[options.method]}))
    model = published(job.files.net.config)
    whose = f"its paper's for {model}" if model else "relative to the model's own sizes"
    said = f"{metrics['accepted']} of {metrics['edits']} edits were written by {TITLES[options.method]}"
    others = [TITLES[name] for name in job.editors if name != options.method]
    said += f" (or {', '.join(others)}, where that was refused)" if others else ""
    said += f" into layer {places}, with settings {whose}; second moments: {job.source}."
    if job.skipped:
        said += f" {len(job.skipped)} records of {options.edits} are no edits and were left out: {_places(job)}."
    if "ppl_ratio_worst" in metrics:
        said += f" The perplexity of the worst corpus is {metrics['ppl_ratio_worst']:.4g} times that before."
    else:
        said += " There was no text to guard the model with: look at it with permjax check."
    return said


def _places(job: Job) -> str:
    """Where the first records that were left out stand."""
    found = [match[0] for reason in job.skipped if (match := _PLACE.search(reason))]
    return ", ".join(found[:_TOLD]) + (", ..." if len(found) > _TOLD else "")


def _size(options: EditOptions, job: Job, change: Change) -> int:
    return len(job.requests[change.first : change.first + options.batch])


# whether edits took


def _mean(scores: Any) -> float:
    """The mean over edits of which something was asked; NaN where there is none."""
    known = np.asarray(scores)[~np.isnan(scores)]
    return float(known.mean()) if known.size else float("nan")


def _efficacies(edited: Edited) -> dict[str, float]:
    found = {}
    for name in _SCORES:
        key = _KEYS.get(name, f"efficacy_{name}")
        for when, scores in (("", edited.after), ("_before", edited.before)):
            if not np.isnan(value := _mean(getattr(scores, name))) and key + when != "locality_before":
                found[key + when] = value
    return found


def _efficacy(edited: Edited) -> Table:
    just = Scores(*(np.concatenate(parts) for parts in zip(*(one.scores for one in edited.changes), strict=True)))
    rows = [
        (name, *(_cell(_mean(getattr(scores, name))) for scores in (edited.before, just, edited.after)), meaning)
        for name, meaning in _SCORES.items()
        if not np.isnan(_mean(getattr(edited.after, name)))
    ]
    caption = "Means over all edits, refused ones too; just after: each edit in the model that it left."
    return Table("Efficacy", ("", "before", "just after", "at the end", "meaning"), tuple(rows), caption)


def _steps(options: EditOptions, job: Job, edited: Edited) -> Table:
    rows = []
    for number, request in enumerate(job.requests[:_ROWS]):
        change = edited.changes[number // options.batch]
        name = "refused" if change.accepted is None else TITLES[change.accepted]
        own = [getattr(edited.after, score)[number] for score in ("bare", "prefixed", "free")]
        just = change.scores.bare[number - change.first]
        rows.append((number + 1, f"{request.text} → {request.target.strip()}", name, just, *own))
    caption = "Just after: in the model that the edit left; the others: at the end."
    columns = ("edit", "fact", "written by", "bare, just after", "bare", "prefixed", "free")
    return Table("Edits", columns, tuple(rows), caption)


def _cell(number: float) -> float | str:
    """A number, or a dash where nothing was measured."""
    return "–" if np.isnan(number) else number


# what they cost


def _perplexities(edited: Edited) -> tuple[Table, ...]:
    groups = edited.report.groups
    rows = [
        (name, float(one.before), float(one.after), float(one.after / one.before), float(one.kl))
        for name, one in groups.items()
    ]
    caption = "Means over sentences of exp of the mean loss of a token. KL: of the predictions from those before, nats."
    return (Table("Perplexity", ("corpus", "before", "after", "ratio", "KL"), tuple(rows), caption),) if rows else ()


def _attempts(edited: Edited) -> Table:
    rows = [_attempt(change, one) for change in edited.changes for one in change.attempts]
    caption = "Every editor that was tried. Energy: what the change adds to what its layer says, relative to that. "
    caption += "Ratios: perplexity of the worst corpus after the edit, to that just before it and to that of the model."
    columns = ("edit", "editor", "energy", "ratio", "ratio to the model", "verdict")
    return Table("What was tried", columns, tuple(rows[:_ROWS]), caption)


def _skipped(job: Job) -> Table:
    return Table("Records that were left out", ("record",), tuple((reason,) for reason in job.skipped[:_ROWS]))


def _attempt(change: Change, one: Attempt) -> tuple:
    numbers = [_worst(one.each, "energy"), _worst(one.each, "perplexity")]
    numbers.append(_worst(one.total, "perplexity") if one.total is not None else float("nan"))
    verdict = "accepted" if one.accepted else str(one.excesses[0])
    return (change.first + 1, TITLES[one.name], *map(_cell, numbers), verdict)


def _worst(report: Any, kind: str) -> float:
    found = [float(value) for (of, _), value in report.signals().items() if of == kind]
    return max(found, default=float("nan"))
