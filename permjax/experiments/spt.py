"""The reversal curse: train small models by several methods, and ask them in both directions."""

import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from permjax.experiments.registry import Experiment
from permjax.experiments.spt_config import SptConfig
from permjax.experiments.spt_report import Speed, Trial, report
from permjax.experiments.spt_tasks import Task, open_checkpoint_model, save_tuned, task_of
from permjax.files import atomic_path
from permjax.report import Outcome
from permjax.reversal.corpus import reverse_kinds, token_documents
from permjax.reversal.evaluate import Antecedents, accuracies, antecedent_probe, bleus, compare_names, perplexity
from permjax.reversal.methods import METHODS, Method
from permjax.reversal.reorder import permute_units
from permjax.reversal.training import Rows, rows_of, train

_REPEATS = 200  # of a permutation, to time it


def run(config: SptConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training.

    Returns:
        Metrics, tables and figures.
    """
    trials: dict[str, list[Trial]] = {name: [] for name in config.chosen}
    state = out / "state"
    pairs = itertools.product(range(config.seed, config.seed + config.seeds), config.shares or (None,))
    model = open_checkpoint_model(config)
    tasks = [task_of(config, model, *pair, state, progress) for pair in pairs]
    for task in tasks:
        for name in config.chosen:
            trial, learned = _trial(config, task, name, state / f"{name}-{task.name}", progress)
            trials[name].append(trial)
            if model is not None and task is tasks[0]:
                save_tuned(model, task.learner, learned, out / "model" / name)
    first = tasks[0]
    speed = Speed(_permute_seconds(first.rows[config.chosen[0]], config.trained.batch_size), *_rate(config, trials))
    cuts = [task.cuts for task in tasks if task.cuts is not None]
    return report(config, first.corpus, trials, speed, _untrained(first).rank, cuts)


def _untrained(task: Task) -> Antecedents:
    """The antecedent probe before any training on the texts: some units are more frequent, so it may beat chance."""
    learner = task.learner
    params = learner.trained.init(jax.random.key(task.seed)) if learner.start is None else learner.start
    return antecedent_probe(learner.net, learner.whole(params), task.corpus, task.words)


def _trial(config: SptConfig, task: Task, name: str, folder: Path, progress: Any) -> tuple[Trial, PyTree]:
    """One model: what it answers, and its trained parameters."""
    method, training, rows = METHODS[name], config.trained, task.rows[name]
    watch = _Watch(task, method, folder.with_name(f"{folder.name}.json"), progress)
    progress.start(f"{name}, seed {task.name}", training.steps)
    watch.begin()
    learner = task.learner
    trained = train(
        learner.trained,
        rows,
        method,
        training,
        task.seed,
        start=learner.start,
        frozen=learner.frozen,
        special=task.words.special,
        checkpoint_dir=folder,
        watch=watch,
    )
    progress.done()
    tokens = float((rows["doc_ids"] >= 0).sum(axis=1).mean()) * training.batch_size
    curve = {int(step): scores for step, scores in watch.seen.items()}
    scores = _scores(task, method, learner.whole(trained.params))
    return Trial(scores, curve, trained.orders, tokens, watch.seconds, task.share), trained.params


def _scores(task: Task, method: Method, params: PyTree) -> dict[str, float]:
    """Everything a trained model is asked."""
    net, words, corpus = task.learner.net, task.words, task.corpus
    found = accuracies(net, params, corpus.prompts, words, method.form)
    found |= {f"bleu_{kind}": value for kind, value in _bleus(task, method, params).items()}
    kinds, known = reverse_kinds(found), {*corpus.names}
    heldout = [prompt for prompt in corpus.prompts if prompt.kind in kinds and prompt.answer in known]
    compared = compare_names(net, params, heldout, corpus.names, words, method.form)
    found["name_above_random"] = 100 * compared.above
    if method.form == "causal":
        probe = antecedent_probe(net, params, corpus, words)
        found |= {"antecedent_rank": probe.rank, "antecedent_first": 100 * probe.first}
        documents = token_documents(corpus, words)
        found["text_ppl"] = perplexity(net, params, dict(rows_of(documents)))
    return found


def _bleus(task: Task, method: Method, params: PyTree) -> dict[str, float]:
    """Of the answers that are longer than what has to be right of them."""
    long = [prompt for prompt in task.corpus.prompts if prompt.most is not None]
    return bleus(task.learner.net, params, long, task.words, method.form) if long else {}


class _Watch:
    """Asks a model while it is trained, keeps what it answered, and takes the time of the rest."""

    def __init__(self, task: Task, method: Method, file: Path, progress: Any):
        self._task, self._method, self._file, self._progress = task, method, file, progress
        self.seen: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
        self.seconds: list[tuple[int, float]] = []
        self._last = (0, 0.0)

    def begin(self) -> None:
        """Training goes on now."""
        done = max(map(int, self.seen), default=0)
        self._progress.step(done)
        self._last = (done, time.perf_counter())

    def __call__(self, done: int, params: PyTree) -> None:
        """Training has come so far."""
        jax.block_until_ready(params)
        steps = done - self._last[0]
        self.seconds.append((steps, time.perf_counter() - self._last[1]))
        task, method = self._task, self._method
        params = task.learner.whole(params)
        scores = accuracies(task.learner.net, params, task.corpus.prompts, task.words, method.form)
        self.seen[str(done)] = scores
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self._file) as temporary:
            temporary.write_text(json.dumps(self.seen))
        shown = np.mean([scores[kind] for kind in reverse_kinds(scores)])
        self._progress.step(steps, reverse=f"{shown:.1f} %")
        self._last = (done, time.perf_counter())


def _permute_seconds(rows: Rows, size: int) -> float:
    """Seconds for permuting one batch in a compiled loop."""
    batch = {name: jnp.asarray(leaf[:size]) for name, leaf in rows.items()}
    length = batch["tokens"].shape[1]

    def once(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        moved = permute_units(jax.random.key(number), batch, max_units=length)
        return total + moved.batch["tokens"][:, 1].sum(), None

    loop = jax.jit(lambda: jax.lax.scan(once, jnp.int32(0), jnp.arange(_REPEATS))[0])
    loop().block_until_ready()
    begin = time.perf_counter()
    loop().block_until_ready()
    return (time.perf_counter() - begin) / _REPEATS


def _rate(config: SptConfig, trials: Mapping[str, list[Trial]]) -> tuple[float, float]:
    """Tokens per second of training, and seconds of a step; without the first call of each run, which compiles."""
    several = config.trained.steps > config.trained.every
    found = [(trial.tokens, *pair) for some in trials.values() for trial in some for pair in trial.seconds[several:]]
    if not found:
        return float("nan"), float("nan")
    tokens, steps, seconds = np.array(found).T
    return float((tokens * steps).sum() / seconds.sum()), float(seconds.sum() / steps.sum())


EXPERIMENT = Experiment(SptConfig, run)
