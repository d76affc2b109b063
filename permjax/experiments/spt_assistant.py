"""A small assistant for `LMSegmenter`, trained on a part of the texts with marks between their units."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from permjax.nets.base import Net
from permjax.reversal.corpus import Corpus, token_documents
from permjax.reversal.lm_segmenter import LMSegmenter, marked_tokens
from permjax.reversal.methods import METHODS
from permjax.reversal.segment_metrics import SegmentScores, compare
from permjax.reversal.training import ReversalTraining, rows_of, small_gpt, train
from permjax.reversal.vocabulary import BOS, MASK, Vocabulary

_SHARE = 0.2  # of the texts
_WIDTH, _LAYERS, _HEADS = 64, 2, 4


class Assistant(NamedTuple):
    """A segmenter, and how it cuts the texts that it was not trained on."""

    segmenter: LMSegmenter
    scores: SegmentScores


def train_assistant(
    corpus: Corpus, words: Vocabulary, training: ReversalTraining, seed: int, folder: Path
) -> Assistant:
    """Train a GPT-2 of two layers on a fifth of the texts, marks between their units, and try it on the others.

    Args:
        corpus: with true units.
        words: its vocabulary; `<mask>` is the mark.
        training: how it is trained.
        seed: of the choice and of the training.
        folder: where the training keeps its state.
    """
    order = np.random.default_rng(seed).permutation(len(corpus.documents))
    taught, others = np.split(order, [max(1, round(_SHARE * len(order)))])
    documents = token_documents(corpus, words, tagged=False)
    rows = rows_of([_marked(documents[number]) for number in taught])
    length = rows["tokens"].shape[1]
    net = small_gpt(len(words), length, width=_WIDTH, layers=_LAYERS, heads=_HEADS)
    trained = train(net, rows, METHODS["ntp"], training, seed, checkpoint_dir=folder)
    found = _segmenter(net, trained.params, words)
    pairs = [(found(corpus.texts[number]), corpus.documents[number]) for number in others]
    return Assistant(found, compare(*zip(*pairs, strict=True)))


def _marked(document: dict) -> dict:
    units = np.maximum.accumulate(np.maximum(document["unit_ids"], 0))  # no mark beside the ends
    tokens = marked_tokens(document["tokens"], units, MASK)
    return {"tokens": tokens, "unit_ids": np.zeros(len(tokens), np.int32), "example_id": document["example_id"]}


def _segmenter(net: Net, params: dict, words: Vocabulary) -> LMSegmenter:
    logits = jax.jit(net.apply)
    return LMSegmenter(lambda tokens: logits(params, tokens), words, MASK, (BOS,), context=net.config.n_positions)
