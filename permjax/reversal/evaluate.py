"""What a model knows: greedy answers by kind of question, log-probabilities, the antecedent probe, perplexity."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from permjax.nets.base import Net
from permjax.reversal.corpus import WRONG, Corpus, Prompt
from permjax.reversal.layout import next_token, positions, visible
from permjax.reversal.methods import Form
from permjax.reversal.questions import Questions, lay_out
from permjax.reversal.vocabulary import Words

BATCH = 256
"""Rows that a model answers at a time."""


def greedy(net: Net, params: PyTree, questions: Questions) -> Int[np.ndarray, "n m"]:
    """The most likely answers, token by token; as many tokens as the longest answer has."""
    steps = questions.answers.shape[1]
    run = functools.partial(_greedy, net, params, masked=questions.form == "masked", steps=steps)
    return _batched(run, questions.tokens, questions.doc_ids, questions.start)


def exact(found: Int[np.ndarray, "n m"], questions: Questions) -> np.ndarray:
    """Whether each answer is right in all of its tokens; an unknown one never is."""
    known = questions.known
    return ((found == questions.answers) | ~known).all(axis=1) & known.any(axis=1)


def by_kind(prompts: Sequence[Prompt], values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The mean of the values of each kind of question."""
    kinds = dict.fromkeys(prompt.kind for prompt in prompts)
    pairs = list(zip(prompts, values, strict=True))
    return {kind: float(np.mean([value for prompt, value in pairs if prompt.kind == kind])) for kind in kinds}


def accuracies(
    net: Net,
    params: PyTree,
    prompts: Sequence[Prompt],
    words: Words,
    form: Form = "causal",
    *,
    tagged: bool = True,
) -> dict[str, float]:
    """Right answers of each kind in percent, and under `<kind>_wrong` the wrong ones that a prompt names.

    Args:
        net: the network.
        params: its weights.
        prompts: the questions; those without an answer count as wrong ones only. Of a prompt with `most` only the first
            so many words of the answer must be right.
        words: of the model.
        form: how the model is asked (`Method.form`).
        tagged: whether texts begin with the tag of their order.

    Source: exact match of Berglund et al. (ICLR 2024).
    """
    found: dict[str, float] = {}
    for suffix, asked in (
        ("", [prompt for prompt in prompts if prompt.answer]),
        (WRONG, [prompt._replace(answer=prompt.wrong) for prompt in prompts if prompt.wrong]),
    ):
        if asked:
            questions = lay_out(asked, words, form, tagged=tagged)
            right = exact(greedy(net, params, questions), questions)
            found |= {kind + suffix: 100 * value for kind, value in by_kind(asked, right).items()}
    return found


def bleus(
    net: Net,
    params: PyTree,
    prompts: Sequence[Prompt],
    words: Words,
    form: Form = "causal",
    *,
    tagged: bool = True,
) -> dict[str, float]:
    """The mean BLEU of the answers of each kind over words, in percent; each is cut to the length it should have."""
    whole = [prompt._replace(most=None) for prompt in prompts]
    questions = lay_out(whole, words, form, tagged=tagged)
    found = greedy(net, params, questions)
    rows = zip(found, questions.answers, questions.known, strict=True)
    values = [bleu(own[known], right[known]) for own, right, known in rows]
    return {kind: 100 * value for kind, value in by_kind(prompts, values).items()}


def bleu(found: Sequence[int] | np.ndarray, right: Sequence[int] | np.ndarray, most: int = 4) -> float:
    """BLEU of one sentence over its tokens, 0 to 1.

    `exp(min(0, 1 - |right| / |found|) + mean_n log p_n)`, n = 1 to `most` or the length of the shorter one; for n > 1
    one is added to matches and to n-grams (Lin and Och, 2004), so that one missing length is not zero.

    Example:
        >>> bleu([1, 2, 3, 4], [1, 2, 3, 4])
        1.0
    """
    found, right = list(map(int, found)), list(map(int, right))
    sizes = range(1, min(most, len(found), len(right)) + 1)
    if not sizes:
        return 0.0
    shares = []
    for n in sizes:
        own, other = (Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (found, right))
        extra = int(n > 1)
        shares.append((sum((own & other).values()) + extra) / (sum(own.values()) + extra))
    if shares[0] == 0:
        return 0.0
    return math.exp(min(0.0, 1 - len(right) / len(found)) + sum(map(math.log, shares)) / len(shares))


def log_probabilities(net: Net, params: PyTree, questions: Questions) -> Float[np.ndarray, " n"]:
    """The log-probability of each answer in nats, all its tokens together.

    With masks each token is foretold beside the right ones before it, as `greedy` writes them.
    """
    run = functools.partial(_log_probabilities, net, params, masked=questions.form == "masked")
    return _batched(run, questions.tokens, questions.doc_ids, questions.start, questions.answers)


class NameComparison(NamedTuple):
    """The right name against a random one.

    Attributes:
        right: the mean log-probability of the right names.
        random: that of random names.
        above: the share of questions in which the right one is the more likely.
    """

    right: float
    random: float
    above: float


def compare_names(
    net: Net,
    params: PyTree,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    words: Words,
    form: Form = "causal",
    *,
    seed: int = 0,
) -> NameComparison:
    """The log-probability of the right name against that of a random other one, per token.

    Source: Berglund et al. (ICLR 2024), section 2.1.1, where reversed the two do not differ.
    """
    rng = np.random.default_rng(seed)
    drawn = [_other(rng, names, prompt.answer) for prompt in prompts]
    both = [*prompts, *(prompt._replace(answer=name) for prompt, name in zip(prompts, drawn, strict=True))]
    right, random = np.split(_per_token(net, params, lay_out(both, words, form)), 2)
    return NameComparison(float(right.mean()), float(random.mean()), float((right > random).mean()))


class Antecedents(NamedTuple):
    """How well the unit before is known from what follows it.

    Attributes:
        rank: its mean rank among the candidates, 1 the best; by chance (1 + candidates) / 2, ties between.
        first: the share of units that come first.
        candidates: how many there were.
    """

    rank: float
    first: float
    candidates: int


def antecedent_probe(
    net: Net,
    params: PyTree,
    corpus: Corpus,
    words: Words,
    *,
    count: int = 100,
    candidates: int = 20,
    seed: int = 0,
) -> Antecedents:
    """The rank of a unit given the rest of its text after it, among units of other texts, for causal models.

    A text is cut before a unit at random, and the model, given what follows, is asked for the unit before the cut. The
    candidates are scored by log-probability per token. This is what Guo et al. call the root of the reversal curse:
    causal models foretell antecedent words badly.

    Args:
        net: the network.
        params: its weights.
        corpus: its documents with two units or more are used.
        words: of the model.
        count: how many texts, at most.
        candidates: the right unit and random others.
        seed: of the choice.

    Raises:
        ValueError: the corpus has no text of two units, or too few different units.
    """
    prompts = _antecedents(corpus, count, candidates, np.random.default_rng(seed))
    scores = _per_token(net, params, lay_out(prompts, words)).reshape(-1, candidates)
    ranks = 1 + ((scores[:, 1:] > scores[:, :1]) + 0.5 * (scores[:, 1:] == scores[:, :1])).sum(axis=1)
    return Antecedents(float(ranks.mean()), float((ranks == 1).mean()), candidates)


def perplexity(net: Net, params: PyTree, rows: dict[str, np.ndarray]) -> float:
    """The exponential of the mean loss of a token after the first of its document, in original order.

    Args:
        net: the network.
        params: its weights.
        rows: from `permjax.reversal.training.rows_of`.
    """
    losses, weights = _batched(functools.partial(_losses, net, params), rows["tokens"], rows["doc_ids"]).T
    return float(np.exp(losses.sum(dtype=np.float64) / weights.sum(dtype=np.float64)))


def _antecedents(corpus: Corpus, count: int, candidates: int, rng: np.random.Generator) -> list[Prompt]:
    """Questions in groups: the right unit first, then those of other texts."""
    several = [units for units in corpus.documents if len(units) > 1]
    pool = [*dict.fromkeys(unit.strip() for units in several for unit in units[:-1])]
    if not several or len(pool) < candidates:
        message = f"There are {len(several)} texts of two units or more with {len(pool)} different antecedents; "
        raise ValueError(message + f"the probe needs one, and {candidates} candidates.")
    prompts = []
    for number in rng.permutation(len(several))[:count]:
        units = several[number]
        cut = int(rng.integers(1, len(units)))
        own = units[cut - 1].strip()
        others = [pool[n] for n in rng.permutation(len(pool))[:candidates] if pool[n] != own][: candidates - 1]
        prompts += [Prompt("antecedent", "".join(units[cut:]), unit) for unit in (own, *others)]
    return prompts


def _other(rng: np.random.Generator, names: Sequence[str], name: str) -> str:
    others = [other for other in names if other != name]
    if not others:
        raise ValueError(f"There is no name to compare {name!r} with; give two or more.")
    return others[rng.integers(len(others))]


def _per_token(net: Net, params: PyTree, questions: Questions) -> Float[np.ndarray, " n"]:
    return log_probabilities(net, params, questions) / questions.known.sum(axis=1)


# compiled


def _batched(run: Any, *arrays: np.ndarray) -> np.ndarray:
    """A function of rows over as many rows as there are, always with the same shapes."""
    rows = len(arrays[0])
    size = min(BATCH, rows)
    found = []
    for first in range(0, rows, size):
        some = np.minimum(np.arange(first, first + size), rows - 1)
        found.append(np.asarray(run(*(array[some] for array in arrays))))
    return np.concatenate(found)[:rows]


def _logits(net: Net, params: PyTree, tokens: Array, doc_ids: Array, *, causal: bool) -> Float[Array, "n t words"]:
    shown = visible(doc_ids, causal=causal)
    return net.apply(params, tokens, positions=positions(doc_ids), visible=shown)


def _at(values: Array, place: Array) -> Array:
    """What stands at one place of each row."""
    return values[jnp.arange(len(values)), place]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("masked", "steps"))
def _greedy(
    net: Net, params: PyTree, tokens: Array, doc_ids: Array, start: Array, *, masked: bool, steps: int
) -> Int[Array, "n m"]:
    row = jnp.arange(len(tokens))

    def write(tokens: Array, step: Array) -> tuple[Array, Array]:
        logits = _logits(net, params, tokens, doc_ids, causal=not masked)
        best = jnp.argmax(_at(logits, start + step - (not masked)), axis=-1).astype(tokens.dtype)
        return tokens.at[row, start + step].set(best), best

    return jax.lax.scan(write, tokens, jnp.arange(steps))[1].T


@functools.partial(jax.jit, static_argnums=0, static_argnames="masked")
def _log_probabilities(
    net: Net, params: PyTree, tokens: Array, doc_ids: Array, start: Array, answers: Array, *, masked: bool
) -> Float[Array, " n"]:
    row = jnp.arange(len(tokens))

    def score(tokens: Array, step: Array) -> tuple[Array, Array]:
        logits = _logits(net, params, tokens, doc_ids, causal=not masked)
        answer = answers[:, step]
        known, place = answer >= 0, start + step
        loss = optax.softmax_cross_entropy_with_integer_labels(
            _at(logits, place - (not masked)), jnp.maximum(answer, 0)
        )
        return tokens.at[row, place].set(jnp.where(known, answer, _at(tokens, place))), -loss * known

    return jax.lax.scan(score, tokens, jnp.arange(answers.shape[1]))[1].sum(axis=0)


@functools.partial(jax.jit, static_argnums=0)
def _losses(net: Net, params: PyTree, tokens: Array, doc_ids: Array) -> Float[Array, "n 2"]:
    batch = next_token({"tokens": tokens, "doc_ids": doc_ids})
    logits = _logits(net, params, tokens, doc_ids, causal=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.stack([(losses * batch["weights"]).sum(axis=1), batch["weights"].sum(axis=1)], axis=1)
