"""What a run on the reversal curse tells: both directions by method, controls and probes, and what it costs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from permjax.report import Curve, Figure, Outcome, Table
from permjax.reversal.corpus import CHAIN, FORWARD, REVERSE_HELDOUT, REVERSE_SEEN, Corpus
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
    "spt": "SPT, true units",
    "spt_rules": "SPT, rules",
    "bico": "BICO-style",
    "mlm_u": "MLM-U",
    "masked_ft": "masked copies",
    "identity_bridge": "identity bridge",
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
    """

    scores: Mapping[str, float]
    curve: Mapping[int, Mapping[str, float]]
    orders: np.ndarray
    tokens: float
    seconds: Sequence[tuple[int, float]]

    @property
    def best(self) -> float:
        """The best accuracy on held-out reverse questions while it was trained."""
        return max(scores[REVERSE_HELDOUT] for scores in self.curve.values())


class Speed(NamedTuple):
    """Seconds to permute a batch, tokens per second of training, and seconds of a step."""

    permute: float
    tokens: float
    step: float


Trials = Mapping[str, Sequence[Trial]]


def report(config: Any, corpus: Corpus, trials: Trials, speed: Speed) -> Outcome:
    """The outcome of all methods.

    Args:
        config: of the run.
        corpus: of the first seed.
        trials: by method and seed.
        speed: what was timed.
    """
    rules = compare(map(RuleSegmenter(), corpus.texts), corpus.documents)
    metrics = dict(_metrics(trials)) | _costs(config, speed) | dict(_segmenter(corpus, rules))
    return Outcome(
        title=f"The reversal curse on generated facts ({config.corpus}): {len(trials)} methods",
        summary=" ".join((_setting(config, corpus, trials), *_verdicts(trials))),
        metrics=metrics,
        tables=(_results(trials), _probes(trials), _orders(trials)),
        figures=(_directions(trials), _learning(trials)),
        headline=tuple(f"{name}_{REVERSE_HELDOUT}" for name in trials),
    )


# metrics


def _metrics(trials: Trials) -> Iterator[tuple[str, float]]:
    for name, some in trials.items():
        for measure in some[0].scores:
            values = _values(some, measure)
            yield f"{name}_{measure}", float(np.mean(values))
            if len(values) > 1:
                yield f"{name}_{measure}_std", float(np.std(values, ddof=1))
        yield f"{name}_{REVERSE_HELDOUT}_best", float(np.mean([trial.best for trial in some]))
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
    seeds = f"the seeds {config.seed}..{config.seed + count - 1}" if count > 1 else f"the seed {config.seed}"
    return (
        f"{len(corpus.documents):,} texts and {len(corpus.prompts):,} questions. All models are trained from scratch "
        f"from {seeds}, with equal steps: {training.steps:,} of {training.batch_size} texts, about {tokens:,.0f} "
        "tokens each. Orders are drawn with equal probabilities, which is our reading of the paper's 'a certain "
        "probability'."
    )


def _verdicts(trials: Trials) -> Iterator[str]:
    """Yield what the numbers say, whatever that is."""
    for name, some in trials.items():
        forward, heldout = (_mean(some, kind) for kind in (FORWARD, REVERSE_HELDOUT))
        yield f"{TITLES[name]}: forward {forward:.1f} %, reverse held out {heldout:.1f} %{_word(forward, heldout)}."
    if {"ntp", "spt"} <= {*trials}:
        yield from _against(trials["ntp"], trials["spt"])


def _word(forward: float, heldout: float) -> str:
    if heldout <= _NOTHING:
        return ", the full curse"
    return ", no gap" if forward - heldout <= _LARGE_GAP else ""


def _against(ntp: Sequence[Trial], spt: Sequence[Trial]) -> Iterator[str]:
    plain, moved = (_mean(some, "antecedent_rank") for some in (ntp, spt))
    agrees = "the direction that the paper gives" if moved < plain else "not the direction that the paper gives"
    yield (
        f"The unit before is ranked {plain:.1f} of 20 by next-token training and {moved:.1f} by SPT: {agrees}, though "
        "an untrained model does better than chance already, because some units are more frequent than others."
    )
    before, after = (_mean(some, "text_ppl") for some in (ntp, spt))
    yield f"The perplexity of the texts in original order is {before:.2f} and {after:.2f} at equal tokens."
    if f"{CHAIN}_wrong" in spt[0].scores:
        right, wrong = _mean(spt, CHAIN), _mean(spt, f"{CHAIN}_wrong")
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
    measures = {FORWARD: "forward", REVERSE_SEEN: "reverse, seen", REVERSE_HELDOUT: "reverse, held out"}
    optional = {"control": "control", CHAIN: "chain", f"{CHAIN}_wrong": "chain, wrong", "unknown_wrong": "never told"}
    first = next(iter(trials.values()))[0].scores
    measures |= {key: head for key, head in optional.items() if key in first}
    rows = [
        (TITLES[name], *(_cell(_values(some, key)) for key in measures), _cell([trial.best for trial in some]))
        for name, some in trials.items()
    ]
    caption = (
        "Exact match of greedy answers in percent, after the last step; 'best' is the best of the checkpoints on "
        "held-out reverse questions. Control: these questions with the answers of others. Never told: an associated "
        "name is given where there is no answer. MLM-U and masked copies are told the length of an answer by its masks."
    )
    return Table("Answers", ("method", *measures.values(), "best"), tuple(rows), caption)


def _probes(trials: Trials) -> Table:
    measures = ("name_above_random", "antecedent_rank", "antecedent_first", "text_ppl")
    rows = [
        (TITLES[name], *(_cell(_values(some, key)) if key in some[0].scores else "" for key in measures))
        for name, some in trials.items()
    ]
    columns = ("method", "right name above random [%]", "rank of the unit before", "it comes first [%]", "perplexity")
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
        Curve(label, methods, [_mean(some, kind) for some in trials.values()])
        for label, kind in (("forward", FORWARD), ("reverse, held out", REVERSE_HELDOUT))
    ]
    caption = "Exact match; facts of held-out questions were told in the other direction alone."
    return Figure("directions", "Both directions", caption, "method", "right answers [%]", tuple(curves), "bars")


def _learning(trials: Trials) -> Figure:
    curves = []
    for name, some in trials.items():
        steps = sorted(some[0].curve)
        values = np.array([[trial.curve[step][REVERSE_HELDOUT] for step in steps] for trial in some])
        ends = (values.min(axis=0), values.max(axis=0)) if len(some) > 1 else (None, None)
        curves.append(Curve(TITLES[name], steps, values.mean(axis=0), *ends))
    caption = "Held-out reverse questions; bands reach from the lowest to the highest seed."
    return Figure("learning", "When the reverse is learned", caption, "step", "right answers [%]", tuple(curves))
