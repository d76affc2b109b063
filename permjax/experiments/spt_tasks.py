"""What all methods of one seed share: texts, tokens, the network, and the weights it begins with."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import PyTree

from permjax.experiments.language_files import LanguageFiles, open_language_model
from permjax.experiments.spt_assistant import Assistant, train_assistant
from permjax.experiments.spt_config import SptConfig
from permjax.io.checkpoint import save_checkpoint
from permjax.lora.formats import save_adapter
from permjax.nets.base import Net
from permjax.reversal.biographies import biographies
from permjax.reversal.checkpoint_words import CheckpointWords, special_of
from permjax.reversal.corpora import assistant_cuts
from permjax.reversal.corpus import Corpus, token_documents
from permjax.reversal.lora_training import lora_net, peft_modules, with_updates
from permjax.reversal.methods import METHODS, corpus_for
from permjax.reversal.segment import Segmenter
from permjax.reversal.segment_metrics import SegmentScores
from permjax.reversal.training import Rows, rows_of, small_gpt, train
from permjax.reversal.vocabulary import Words


class Learner(NamedTuple):
    """What is trained, and what is asked.

    Attributes:
        net: the language model.
        trained: the network whose parameters are trained: the same, or one of low-rank updates.
        start: the parameters to begin with; drawn by default.
        frozen: the weights that updates are added to.
        scale: of the updates.
    """

    net: Net
    trained: Net
    start: PyTree | None = None
    frozen: Any = None
    scale: float = 1.0

    def whole(self, params: PyTree) -> PyTree:
        """The weights of the language model after training."""
        return params if self.frozen is None else with_updates(self.frozen, params, self.scale)


class Task(NamedTuple):
    """What all methods of one seed, and of one share, have in common."""

    name: str
    seed: int
    share: float | None
    corpus: Corpus
    words: Words
    learner: Learner
    rows: Mapping[str, Rows]
    cuts: SegmentScores | None


def open_checkpoint_model(config: SptConfig) -> LanguageFiles | None:
    """The checkpoint that is fine-tuned, if there is one."""
    return None if config.checkpoint is None else open_language_model(config.checkpoint)


def task_of(
    config: SptConfig, model: LanguageFiles | None, seed: int, share: float | None, state: Path, progress: Any
) -> Task:
    """The task of one seed and share.

    Args:
        config: of the run.
        model: what is fine-tuned; models are trained from scratch by default.
        seed: of the corpus and of all training.
        share: of the facts that are told in both directions, where that is varied.
        state: where an assistant and a base model keep their state.
        progress: told about their training.
    """
    corpus = config.load(seed, share)
    name = str(seed) if share is None else f"{seed}-{share:g}"
    base = None if config.pretraining is None else Corpus(biographies(corpus.names, seed=seed), (), ())
    words = _words(corpus, base, model)
    assistant = None
    if "spt_lm" in config.chosen:
        progress.start(f"the assistant, seed {name}", 1)
        own = corpus.vocabulary()
        assistant = train_assistant(corpus, own, config.assistant, seed, state / f"assistant-{name}")
        progress.step()
    cutters = _cutters(config, assistant)
    documents = {name: token_documents(corpus_for(METHODS[name], corpus, cutters), words) for name in config.chosen}
    known = [] if base is None else token_documents(base, words)
    length = max(len(document["tokens"]) for some in (*documents.values(), known) for document in some)
    learner = _scratch(config, len(words), length) if model is None else _tuned(config, model)
    if config.pretraining is not None:
        progress.start(f"the base model, seed {name}", 1)
        learner = _based(config, learner, rows_of(known, length), seed, state / f"base-{name}")
        progress.step()
    rows = {name: rows_of(some, length) for name, some in documents.items()}
    return Task(name, seed, share, corpus, words, learner, rows, None if assistant is None else assistant.scores)


def _words(corpus: Corpus, base: Corpus | None, model: LanguageFiles | None) -> Any:
    if model is not None:
        return CheckpointWords(model.tokenizer, special_of(model.config))
    return replace(corpus, documents=corpus.documents + (() if base is None else base.documents)).vocabulary()


def _cutters(config: SptConfig, assistant: Assistant | None) -> dict[str, Segmenter]:
    """The segmenters that the methods ask for, beside `rules`."""
    found: dict[str, Segmenter] = {} if assistant is None else {"lm": assistant.segmenter}
    if "spt_assistant" in config.chosen:
        found["assistant"] = assistant_cuts(config.corpus, config.data.root)
    return found


def _scratch(config: SptConfig, words: int, length: int) -> Learner:
    size = config.model
    net = small_gpt(words, length, width=size.width, layers=size.layers, heads=size.heads)
    return Learner(net, net)


def _tuned(config: SptConfig, model: LanguageFiles) -> Learner:
    """All weights of a checkpoint, or low-rank updates of its matrices."""
    if config.lora is None:
        return Learner(model.net, model.net, model.params)
    lora = config.lora
    trained = lora_net(model.net, model.params, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
    return Learner(model.net, trained, None, model.params, lora.alpha / lora.rank)


def _based(config: SptConfig, learner: Learner, rows: Rows, seed: int, folder: Path) -> Learner:
    """The learner with weights that know the people alone, told in original order."""
    training = config.pretraining or config.training
    params = train(learner.net, rows, METHODS["ntp"], training, seed, start=learner.start, checkpoint_dir=folder).params
    return learner._replace(start=params)


def save_tuned(model: LanguageFiles, learner: Learner, params: PyTree, path: Path) -> None:
    """Write a fine-tuned checkpoint with its configuration and tokenizer, or its updates as a PEFT adapter.

    Args:
        model: what was fine-tuned.
        learner: how.
        params: its trained parameters.
        path: a folder.
    """
    if learner.frozen is None:
        save_checkpoint(path, params, like=model.checkpoint)
        return
    modules = peft_modules(params, learner.scale, transposed=model.net.config.model_type == "gpt2")
    save_adapter(path, modules, like=())
