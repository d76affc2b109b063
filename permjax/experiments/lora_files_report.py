"""What merging, inspecting and extracting adapters tell: tables sorted by trouble, heat maps, and a verdict."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from permjax.experiments.lora_extract import ExtractedFiles, ExtractedModule, LoraExtractOptions
from permjax.experiments.lora_files import LoraMergeOptions, MergedFiles
from permjax.lora.formats import AdapterFiles
from permjax.lora.inspection import Inspection
from permjax.lora.quality import Quality
from permjax.lora.verdict import Overall, overall, verdict, warnings
from permjax.report import Matrix, Outcome, Table, Text

_SHARES = (0.9, 0.95, 0.99)
_LARGEST_MAP = 48  # rows of a heat map


# merging


def merged_outcome(options: LoraMergeOptions, result: MergedFiles) -> Outcome:
    """The outcome of a merge."""
    job, found = result.job, result.found
    names = short_names(options.adapters)
    whole, warned = overall(found), warnings(found, job.method, names)
    said = verdict(whole, warned)
    troubled = sorted(found, key=lambda name: -_number(found[name].error))
    return Outcome(
        title=f"{', '.join(names)} merged by {job.method}",
        summary=" ".join((_what(options, result), said, *(f"Warning: {text}" for text in warned))),
        metrics=_metrics(result, whole, said, warned),
        tables=(
            _adapter_table(options, result, whole),
            _module_table(found, troubled),
            _input_table(found, troubled),
            _error_table(found, troubled, names),
        ),
        figures=tuple(_figures(found, whole, names)),
        headline=("verdict", "error_to_sum", "best_error", "cosine", "energy_kept_min"),
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, with numbers in front where they are not enough to tell them apart."""
    names = [Path(path).resolve().name for path in paths]
    return [f"{i}-{name}" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _what(options: LoraMergeOptions, result: MergedFiles) -> str:
    ranks = [one.a.shape[0] for one in result.merged.values()]
    shares = ", ".join(f"{w:.4g}" for w in result.job.weights)
    return (
        f"{len(options.adapters)} adapters with the weights {shares} were merged by {result.job.method} into "
        f"{_ranks(ranks)} in {len(ranks)} modules, and written to {options.out}."
    )


def _ranks(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def _metrics(result: MergedFiles, whole: Overall, said: str, warned: Sequence[str]) -> dict[str, Any]:
    ranks = [one.a.shape[0] for one in result.merged.values()]
    numbers = {
        "verdict": said.partition(":")[0].lower(),
        "error_to_sum": whole.error,
        "best_error": whole.best,
        "cosine": whole.cosine,
        "energy_kept_min": whole.kept_min,
        "energy_kept_std": whole.kept_std,
        "scale": whole.scale,
        "cross_terms": whole.cross,
        "effective_rank_sum": whole.effective_sum,
        "effective_rank_merged": whole.effective_merged,
        "piece_norm_spread": whole.spread,
        "adapters": len(result.job.adapters),
        "modules": whole.modules,
        "rank_max": max(ranks),
        "rank_total": sum(ranks),
        "warnings": len(warned),
    }
    return numbers if whole.purity is None else numbers | {"cluster_purity": whole.purity}


def _adapter_table(options: LoraMergeOptions, result: MergedFiles, whole: Overall) -> Table:
    norms = np.sqrt(sum(one.norms.astype(float) ** 2 for one in result.found.values()))
    rows = []
    for i, (path, files) in enumerate(zip(options.adapters, result.job.adapters, strict=True)):
        shown = _ranks([info.rank for info in files.values()]).partition(" ")[2]
        numbers = (float(result.job.weights[i]), float(norms[i]), float(whole.errors[i]), float(whole.kept[i]))
        rows.append((path, files.style, len(files), shown, *numbers))
    columns = ("adapter", "style", "modules", "rank", "weight", "norm", "relative error", "energy kept")
    caption = (
        "Norm of all updates together; distance of the merged update to the adapter's, over its norm; and the share of "
        "the adapter's squared norm that lies in the rows and columns of the merged update."
    )
    return Table("Adapters", columns, tuple(rows), caption)


def _module_table(found: Mapping[str, Quality], order: Sequence[str]) -> Table:
    columns = ("module", "rank", "error", "best error", "cosine", "kept least", "kept std", "scale")
    rows = []
    for name in order:
        one = found[name]
        kept = one.kept[np.isfinite(one.kept)]
        least, std = (float(kept.min()), float(kept.std())) if kept.size else (np.nan, np.nan)
        rows.append((name, one.rank, one.error, one.best, one.cosine, least, std, one.scale))
    caption = (
        "Relative error to the weighted sum, and the smallest that this rank allows; cosine with the weighted sum; "
        "smallest retained energy of an adapter, and its standard deviation over adapters (0 is fair to all); norm of "
        "the merged update over the adapters' mean."
    )
    return Table("Modules, the most troubled first", columns, tuple(rows), caption)


def _input_table(found: Mapping[str, Quality], order: Sequence[str]) -> Table:
    clusters = any(one.sizes is not None for one in found.values())
    columns = [
        "module",
        "mean cosine",
        "cross terms",
        "effective rank of sum",
        "effective rank of result",
        "norm spread",
    ]
    columns += ["clusters", "largest", "purity"] if clusters else []
    rows = []
    for name in order:
        one = found[name]
        row = [name, _mean_cosine(one), one.cross, one.effective_sum, one.effective_merged, one.spread]
        if clusters:
            sizes = one.sizes if one.sizes is not None else np.zeros(1, int)
            row += [int((sizes > 0).sum()), int(sizes.max()), float("nan") if one.purity is None else one.purity]
        rows.append(tuple(row))
    caption = (
        "Mean cosine between the adapters' updates; what adding factors instead of updates would add, over the norm of "
        "the weighted sum; effective ranks (exponential of the entropy of the squared singular values); largest over "
        "smallest norm of the rank-one pieces."
    )
    if clusters:
        caption += (
            " Clusters that have pieces, the size of the largest, and purity: the share of pieces that belong to the "
            "adapter from which their cluster has the most (1: no cluster mixes adapters)."
        )
    return Table("What was merged", tuple(columns), tuple(rows), caption)


def _error_table(found: Mapping[str, Quality], order: Sequence[str], names: Sequence[str]) -> Table:
    columns = ("module", *(f"error to {name}" for name in names), *(f"kept of {name}" for name in names))
    rows = tuple((name, *map(float, found[name].errors), *map(float, found[name].kept)) for name in order)
    caption = "Relative error of the merged update to each adapter's, and retained energy; nan where it has none."
    return Table("Every module and adapter", columns, rows, caption)


def _figures(found: Mapping[str, Quality], whole: Overall, names: Sequence[str]) -> list[Matrix]:
    caption = "Relative error of the merged update to the weighted sum, for every layer and projection."
    drawn = heat_map("error", "Error to the weighted sum", caption, found, lambda one: one.error)
    figures = [drawn] if drawn else []
    if len(names) > 1:
        text = "Between the updates of all modules together; 0 where adapters change different things."
        figures.append(
            Matrix("cosines", "Cosines of the adapters", text, "", "", "cosine", names, names, whole.cosines)
        )
    return figures


# inspecting


def inspected_outcome(adapter: AdapterFiles, found: Mapping[str, Inspection]) -> Outcome:
    """The outcome of an inspection."""
    norms = np.array([one.norm for one in found.values()])
    ranks, dead = [one.rank for one in found.values()], sum(one.dead for one in found.values())
    needed = [max(one.rank_for(share) for one in found.values()) for share in _SHARES]
    enough = ", ".join(f"{k} for {100 * share:.0f} %" for k, share in zip(needed, _SHARES, strict=True))
    summary = (
        f"An adapter of style {adapter.style} with {len(found)} modules and {_ranks(ranks)}. The rank that keeps the "
        f"energy of every module: {enough}."
    )
    if dead:
        summary += f" {dead} of {sum(ranks)} ranks are dead: they add nothing."
    return Outcome(
        title=f"The adapter {adapter.path}",
        summary=summary,
        metrics={
            "modules": len(found),
            "rank_max": max(ranks),
            "rank_total": sum(ranks),
            "norm": float(np.sqrt((norms**2).sum())),
            "effective_rank_mean": float(np.mean([one.effective for one in found.values()])),
            **{f"rank_for_{100 * share:.0f}": k for share, k in zip(_SHARES, needed, strict=True)},
            "dead_ranks": dead,
        },
        tables=(_inspection_table(adapter, found),),
        figures=tuple(_inspection_maps(found)),
    )


def _inspection_table(adapter: AdapterFiles, found: Mapping[str, Inspection]) -> Table:
    most = max(one.rank for one in found.values())
    smaller = [2**i for i in range(most.bit_length()) if 2**i < most]
    columns = ("module", "size", "rank", "scale", "norm", "effective", "spread", "dead")
    columns += tuple(f"{100 * share:.0f} %" for share in _SHARES) + tuple(f"at {k}" for k in smaller)
    rows = []
    for name in sorted(found, key=lambda name: -found[name].norm):
        one, info = found[name], adapter[name]
        row = (name, f"{info.size_out} x {info.size_in}", one.rank, float(info.scale), one.norm, one.effective)
        kept = tuple(float(one.energy[min(k, one.rank) - 1]) for k in smaller)
        rows.append((*row, one.spread, one.dead, *(one.rank_for(share) for share in _SHARES), *kept))
    caption = (
        "The largest updates first. Effective rank; largest over smallest norm of the rank-one pieces; dead ranks; the "
        "smallest ranks that keep so much of the energy; and the share of the energy that smaller ranks keep."
    )
    return Table("Modules", columns, tuple(rows), caption)


def _inspection_maps(found: Mapping[str, Inspection]) -> list[Matrix]:
    drawn = [
        heat_map("norm", "Size of the updates", "Frobenius norms.", found, lambda one: one.norm),
        heat_map("effective", "Effective rank", "Of every layer and projection.", found, lambda one: one.effective),
    ]
    return [one for one in drawn if one]


# extracting


def extracted_outcome(options: LoraExtractOptions, result: ExtractedFiles) -> Outcome:
    """The outcome of an extraction."""
    found, left_out = result
    norms, kept = (np.array([getattr(one, key) for one in found.values()]) for key in ("norm", "kept"))
    share = float((kept * norms**2).sum() / (norms**2).sum())
    summary = (
        f"The change of {len(found)} weights from {options.base} to {options.tuned} was written to {options.out} as an "
        f"adapter of rank {options.rank}, which holds {100 * share:.1f} % of its energy."
    )
    if left_out:
        summary += f" Warning: {len(left_out)} more tensors have changed and are not part of it, such as {left_out[0]}."
    drawn = heat_map("kept", "Energy kept", "For every layer and projection.", found, lambda one: one.kept)
    return Outcome(
        title=f"An adapter from {options.base} to {options.tuned}",
        summary=summary,
        metrics={
            "energy_kept": share,
            "energy_kept_min": float(kept.min()),
            "modules": len(found),
            "rank": options.rank,
            "left_out": len(left_out),
        },
        tables=(_extraction_table(found, options.rank),),
        figures=(drawn,) if drawn else (),
        texts=(Text("Changed, but not part of the adapter", "\n".join(left_out)),) if left_out else (),
        headline=("energy_kept", "energy_kept_min", "modules", "left_out"),
    )


def _extraction_table(found: Mapping[str, ExtractedModule], rank: int) -> Table:
    rows = tuple(
        (name, " x ".join(map(str, one.shape)), one.norm, one.relative, one.kept)
        for name, one in sorted(found.items(), key=lambda item: item[1].kept)
    )
    columns = ("module", "shape", "norm of the change", "relative to the weight", "energy kept")
    caption = f"Where the least is kept, first: the share of the squared singular values that rank {rank} has."
    return Table("Modules", columns, rows, caption)


# heat maps


def heat_map(
    name: str, title: str, caption: str, found: Mapping[str, Any], number: Callable[[Any], float]
) -> Matrix | None:
    """A number of every module, layers down and projections across; None where there is no such order.

    A layer is what comes before and with the last number in a module's name, but for one at its end.
    """
    places = {module: place for module in found if (place := place_of(module))}
    layers, projections = (list(dict.fromkeys(place[i] for place in places.values())) for i in (0, 1))
    if len(places) < 2:
        return None
    values = np.full((len(layers), len(projections)), np.nan)
    for module, (layer, projection) in places.items():
        values[layers.index(layer), projections.index(projection)] = number(found[module])
    if len(layers) > _LARGEST_MAP:
        worst = np.sort(np.argsort(-np.nan_to_num(values, nan=-np.inf).max(1), kind="stable")[:_LARGEST_MAP])
        layers, values = [layers[i] for i in worst], values[worst]
        caption += f" Only the {_LARGEST_MAP} layers with the largest numbers are shown."
    return Matrix(name, title, caption, "projection", "layer", "", without_common(layers), projections, values)


def place_of(module: str) -> tuple[str, str] | None:
    """The layer and the projection in the name of a module."""
    found = re.match(r"(.*(?:^|[._])\d+)[._](.*[a-zA-Z].*)$", module)
    return (found[1], found[2]) if found else None


def without_common(names: Sequence[str]) -> list[str]:
    """Names without the part before the last dot or underscore that all have in common."""
    first, last = min(names), max(names)
    same = next((i for i, (x, y) in enumerate(zip(first, last, strict=False)) if x != y), min(len(first), len(last)))
    cut = max(first.rfind(".", 0, same), first.rfind("_", 0, same)) + 1
    return [name[cut:] for name in names]


def _mean_cosine(one: Quality) -> float:
    """The mean cosine of pairs of adapters that have the module."""
    pairs = one.cosines[np.triu_indices(len(one.norms), 1)]
    known = pairs[np.isfinite(pairs)]
    return float(known.mean()) if known.size else float("nan")


def _number(value: float) -> float:
    """A number to sort by; what is not known comes last."""
    return value if np.isfinite(value) else -np.inf
