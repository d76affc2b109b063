"""What a run on the reversal curse tells: both directions by method, controls and probes, and what it costs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from permjax.report import Curve, Figure, Outcome, Table
from permjax.reversal.corpus import CHAIN, WRONG, Corpus, forward_kinds, reverse_kinds
from permjax.reversal.reorder import ORDERS
from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment_metrics import SegmentScores, check_segmenter, compare, name_spans, unsplit_rate

TITLES = {
    "ntp": "next token",
    "token_permutation": "token permutation",
    "token_reversal": "token reversal",
    "random_permutation": "random runs",
    "ngram2": "2-gram permutation",
    "ngram3": "3-gram permutation",
    "unit_reversal": "unit reversal",
    "spt": "SPT",
    "spt_rules": "SPT, rules",
    "spt_assistant": "SPT, authors' units",
    "spt_lm": "SPT, small assistant",
    "bico": "BICO-style",
    "mlm_u": "MLM-U",
    "masked_ft": "masked copies",
    "identity_bridge": "identity bridge",
}
MEASURES = {
    "forward": "forward",
    "forward_names": "forward, names",
    "forward_descriptions": "forward, descriptions",
    "reverse_seen": "reverse, seen",
    "reverse_heldout": "reverse, held out",
    "reverse_names": "reverse, names",
    "reverse_descriptions": "reverse, descriptions",
    "control": "control",
    CHAIN: "chain",
    CHAIN + WRONG: "chain, wrong",
    "unknown" + WRONG: "never told",
}
_LARGE_GAP, _NOTHING = 5.0, 2.0  # points


class Trial(NamedTuple):
    """One model.

    Attributes:
        scores: of the trained model, percentages but for ranks and perplexities.
        curve: accuracies by the number of steps.
        orders: how many documents came in each order.
        tokens: in a batch, on average.
        seconds: steps and seconds of each call of training.
        share: of the facts that were told in both directions, where that is varied.
    """

    scores: Mapping[str, float]
    curve: Mapping[int, Mapping[str, float]]
    orders: np.ndarray
    tokens: float
    seconds: Sequence[tuple[int, float]]
    share: float | None = None

    def best(self, kind: str) -> float:
        """The best accuracy on a kind of questions while it was trained."""
        return max(scores[kind] for scores in self.curve.values())


class Speed(NamedTuple):
    """Seconds to permute a batch, tokens per second of training, and seconds of a step."""

    permute: float
    tokens: float
    step: float


Trials = Mapping[str, Sequence[Trial]]


def report(
    config: Any,
    corpus: Corpus,
    trials: Trials,
    speed: Speed,
    untrained: float,
    assistants: Sequence[SegmentScores] = (),
) -> Outcome:
    """The outcome of all methods.

    Args:
        config: of the run.
        corpus: of the first seed.
        trials: by method, and for each its seeds and shares.
        speed: what was timed.
        untrained: the rank of the unit before in the antecedent probe of the first model before training.
        assistants: how the assistant of each seed cuts texts, where there is one.
    """
    rules = compare(map(RuleSegmenter(), corpus.texts), corpus.documents)
    metrics = (
        dict(_metrics(trials))
        | {"untrained_antecedent_rank": untrained}
        | _costs(config, speed)
        | dict(_segmenter(corpus, rules))
    )
    for name in SegmentScores._fields if assistants else ():
        metrics[f"segmenter_lm_{name}"] = float(np.mean([getattr(scores, name) for scores in assistants]))
    shared = (_by_share(trials),) if config.shares else ()
    _, kinds = _kinds(trials)
    return Outcome(
        title=f"The reversal curse ({config.corpus}): {len(trials)} methods",
        summary=" ".join((_setting(config, corpus, trials), *_verdicts(trials, untrained))),
        metrics=metrics,
        tables=(_results(trials), *shared, _probes(trials), _orders(trials)),
        figures=(_directions(trials), _learning(trials)),
        headline=tuple(f"{name}_{kind}" for kind in kinds for name in trials),
    )


def _kinds(trials: Trials) -> tuple[list[str], list[str]]:
    """The kinds of questions in the direction of training, and in one never told."""
    found = next(iter(trials.values()))[0].scores
    return [kind for kind in forward_kinds(found) if kind in MEASURES], reverse_kinds(found)


# metrics


def _metrics(trials: Trials) -> Iterator[tuple[str, float]]:
    for name, some in trials.items():
        for measure in some[0].scores:
            values = _values(some, measure)
            yield f"{name}_{measure}", float(np.mean(values))
            if len(values) > 1:
                yield f"{name}_{measure}_std", float(np.std(values, ddof=1))
        for kind in _kinds(trials)[1]:
            yield f"{name}_{kind}_best", float(np.mean([trial.best(kind) for trial in some]))
        counts = np.sum([trial.orders for trial in some], axis=0)
        if counts.any():
            shares = zip(ORDERS, counts / counts.sum(), strict=True)
            yield from ((f"{name}_share_{order}", float(share)) for order, share in shares)


def _costs(config: Any, speed: Speed) -> dict[str, float | int]:
    found = {"steps": config.trained.steps, "seeds": config.seeds}
    if np.isfinite(speed.step):
        found |= {"tokens_per_second": speed.tokens, "permute_share_of_step": speed.permute / speed.step}
    return found


def _segmenter(corpus: Corpus, rules: SegmentScores) -> Iterator[tuple[str, float]]:
    """Yield how the rule segmenter cuts these texts, against their true units."""
    yield from ((f"segmenter_{name}", float(value)) for name, value in rules._asdict().items())
    wholes = [name_spans(text, corpus.names) for text in corpus.texts]
    yield "segmenter_names_unsplit", unsplit_rate(map(RuleSegmenter(), corpus.texts), wholes)
    yield "segmenter_lossless", check_segmenter(RuleSegmenter(), corpus.texts).lossless


def _values(some: Sequence[Trial], measure: str) -> list[float]:
    return [trial.scores[measure] for trial in some]


def _mean(some: Sequence[Trial], measure: str) -> float:
    return float(np.mean(_values(some, measure)))


# words


def _setting(config: Any, corpus: Corpus, trials: Trials) -> str:
    training, tokens = config.trained, next(iter(trials.values()))[0].tokens
    count = config.seeds
    units = "cut by the embedded rules" if config.corpus == "descriptions" else "the true ones"
    seeds = f"the seeds {config.seed}..{config.seed + count - 1}" if count > 1 else f"the seed {config.seed}"
    return (
        f"{len(corpus.documents):,} texts and {len(corpus.prompts):,} questions. All models are {_begin(config)} "
        f"from {seeds}, with equal steps: {training.steps:,} of {training.batch_size} texts, about {tokens:,.0f} "
        f"tokens each. The units of SPT are {units}. Orders are drawn with equal probabilities, which is our reading "
        "of the paper's 'a certain probability'."
    )


def _begin(config: Any) -> str:
    if config.checkpoint is not None:
        how = "in all weights" if config.lora is None else f"by updates of rank {config.lora.rank}"
        return f"fine-tuned {how} from the checkpoint {Path(config.checkpoint).name}, with training drawn"
    if config.pretraining is None:
        return "trained from scratch"
    about = "texts about the same people that tell none of the facts, in original order"
    return f"trained from scratch on {about} ({config.pretraining.steps:,} steps), and fine-tuned on the facts"


def _verdicts(trials: Trials, untrained: float) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    forward, reverse = _kinds(trials)
    for name, some in trials.items():
        means = [[_mean(some, kind) for kind in kinds] for kinds in (forward, reverse)]
        told = ", ".join(
            f"{MEASURES[kind].replace(', ', ' ')} {mean:.1f} %"
            for kind, mean in zip((*forward, *reverse), (*means[0], *means[1]), strict=True)
        )
        yield f"{TITLES[name]}: {told}{_word(*(float(np.mean(some)) for some in means))}."
    if {"ntp", "spt"} <= {*trials}:
        yield from _against(trials["ntp"], trials["spt"], untrained)


def _word(forward: float, heldout: float) -> str:
    if heldout <= _NOTHING:
        return ", the full curse"
    return ", no gap" if forward - heldout <= _LARGE_GAP else ""


def _against(ntp: Sequence[Trial], spt: Sequence[Trial], untrained: float) -> Iterator[str]:
    plain, moved = (_mean(some, "antecedent_rank") for some in (ntp, spt))
    agrees = "the direction that the paper gives" if moved < plain else "not the direction that the paper gives"
    yield (
        f"The unit before is ranked {plain:.1f} of 20 by next-token training and {moved:.1f} by SPT ({untrained:.1f} "
        f"before training, 10.5 by chance): {agrees}."
    )
    before, after = (_mean(some, "text_ppl") for some in (ntp, spt))
    yield f"The perplexity of the texts in original order is {before:.2f} and {after:.2f} at equal tokens."
    if CHAIN + WRONG in spt[0].scores:
        right, wrong = _mean(spt, CHAIN), _mean(spt, CHAIN + WRONG)
        yield (
            f"Of people in the middle of a chain SPT names the right one in {right:.1f} % and the associated one in "
            f"{wrong:.1f} %: permutation restores the association before the relation."
        )
    elif "unknown_wrong" in spt[0].scores:
        yield (
            f"Asked for what was never told, SPT answers with the associated name in {_mean(spt, 'unknown_wrong'):.1f} "
            "%: it learns the association, and the direction of the relation less."
        )


# tables


def _results(trials: Trials) -> Table:
    first, (_, reverse) = next(iter(trials.values()))[0].scores, _kinds(trials)
    measures = {kind: head for kind, head in MEASURES.items() if kind in first}
    heads = [f"best {head.removeprefix('reverse, ')}" for head in (MEASURES[kind] for kind in reverse)]
    rows = [
        (
            TITLES[name],
            *(_cell(_values(some, kind)) for kind in measures),
            *(_cell([trial.best(kind) for trial in some]) for kind in reverse),
        )
        for name, some in trials.items()
    ]
    return Table("Answers", ("method", *measures.values(), *heads), tuple(rows), " ".join(_legend(first, trials)))


def _legend(scores: Mapping[str, float], names: Iterable[str]) -> Iterator[str]:
    yield "Exact match of greedy answers in percent, after the last step; 'best' is the best of the checkpoints."
    if any(kind.startswith("bleu_") for kind in scores):
        yield "Of descriptions the first three words must be right."
    if "control" in scores:
        yield "Control: the held-out reverse questions with the answers of others."
    if "unknown" + WRONG in scores:
        yield "Never told: an associated name is given where there is no answer."
    if {"mlm_u", "masked_ft"} & {*names}:
        yield "MLM-U and masked copies are told the length of an answer by its masks."


def _by_share(trials: Trials) -> Table:
    """What the share of facts told in both directions does."""
    first = next(iter(trials.values()))
    measures = {kind: head for kind, head in MEASURES.items() if kind in first[0].scores and kind != "control"}
    rows = []
    for name, some in trials.items():
        for share in dict.fromkeys(trial.share for trial in some):
            chosen = [trial for trial in some if trial.share == share]
            cells = (_cell(_values(chosen, kind)) for kind in measures)
            rows.append((TITLES[name], f"{100 * (share or 0.0):.0f} %", *cells))
    return Table("By the share of facts told in both directions", ("method", "share", *measures.values()), tuple(rows))


def _probes(trials: Trials) -> Table:
    measures = {
        "name_above_random": "right name above random [%]",
        "antecedent_rank": "rank of the unit before",
        "antecedent_first": "it comes first [%]",
        "text_ppl": "perplexity",
    }
    first = next(iter(trials.values()))[0].scores
    measures |= {kind: f"BLEU {kind[5:].replace('_', ', ')} [%]" for kind in first if kind.startswith("bleu_")}
    rows = [
        (TITLES[name], *(_cell(_values(some, key)) if key in some[0].scores else "" for key in measures))
        for name, some in trials.items()
    ]
    columns = ("method", *measures.values())
    caption = (
        "Held-out reverse questions: how often the right name is likelier than a random one. The unit before a cut is "
        "ranked among 20 given the rest of its text, 10.5 by chance. Perplexity of the texts in original order."
    )
    return Table("Probes", columns, tuple(rows), caption)


def _orders(trials: Trials) -> Table:
    rows = []
    for name, some in trials.items():
        counts = np.sum([trial.orders for trial in some], axis=0)
        if counts.any():
            rows.append((TITLES[name], *(float(100 * n / counts.sum()) for n in counts)))
    caption = "Realised shares in percent. A text of one unit looks the same in all orders, one of two in two of them."
    return Table("Orders", ("method", *ORDERS), tuple(rows), caption)


def _cell(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"


# figures


def _directions(trials: Trials) -> Figure:
    methods = [TITLES[name] for name in trials]
    curves = [
        Curve(MEASURES[kind], methods, [_mean(some, kind) for some in trials.values()])
        for kinds in _kinds(trials)
        for kind in kinds
    ]
    caption = "Exact match; what reverse questions ask for was told in the other direction alone."
    return Figure("directions", "Both directions", caption, "method", "right answers [%]", tuple(curves), "bars")


def _learning(trials: Trials) -> Figure:
    curves, (_, kinds) = [], _kinds(trials)
    for name, some in trials.items():
        steps = sorted(some[0].curve)
        values = np.array([[np.mean([trial.curve[step][kind] for kind in kinds]) for step in steps] for trial in some])
        ends = (values.min(axis=0), values.max(axis=0)) if len(some) > 1 else (None, None)
        curves.append(Curve(TITLES[name], steps, values.mean(axis=0), *ends))
    caption = "Questions in a direction never told; bands reach from the lowest to the highest model."
    return Figure("learning", "When the reverse is learned", caption, "step", "right answers [%]", tuple(curves))
