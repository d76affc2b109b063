"""Merge adapters that teach a small language model new meanings of words: every method, controls and attacks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from permjax.experiments.lora_tasks_data import Examples, Language
from permjax.experiments.lora_tasks_measures import Bench, measure, steps
from permjax.experiments.lora_tasks_report import report
from permjax.experiments.lora_tasks_rows import Trial, Trials
from permjax.experiments.lora_tasks_scores import Judge, Score, module_inputs
from permjax.experiments.lora_tasks_training import (
    AdapterTraining,
    Model,
    SizeConfig,
    network,
    train_adapters,
    train_bases,
)
from permjax.experiments.registry import Experiment
from permjax.lora.methods import METHODS
from permjax.lora.pool import Adapter
from permjax.report import Outcome
from permjax.train import TrainConfig
from permjax.tree import nearest


@dataclass(frozen=True)
class LoraTasksConfig:
    """An experiment on merging one adapter per task.

    Attributes:
        language: the words that the base models know, and the new meanings that are the tasks.
        size: of the base models.
        base: how they are trained.
        foundation: questions that they are trained on.
        adapter: how adapters are trained.
        ranks: of the adapter of each task.
        methods: to compare, names of `permjax.lora.methods.METHODS`.
        swept: those of them that are run at several ranks.
        factors: of the merged update, of which the best on the validation questions is shown beside 1.
        validation: questions of every task by which a factor is chosen.
        test: questions of every task on which accuracies are measured.
        inputs: questions of every task for methods that use data.
        gauge: standard deviation of the logarithms of the scales of a random gauge.
        trials: number of base models, each with its own adapters; results are means over them.
        seed: they are trained from the seeds `seed`, `seed + 1`, ...
    """

    experiment: ClassVar[str] = "lora_tasks"
    language: Language = Language()
    size: SizeConfig = SizeConfig()
    base: TrainConfig = field(
        default_factory=lambda: TrainConfig(6, 128, "adamw", 3e-3, "cosine", warmup_steps=100, weight_decay=0.01)
    )
    foundation: int = 20_000
    adapter: AdapterTraining = AdapterTraining()
    ranks: tuple[int, ...] = (2, 2, 4, 4, 8)
    methods: tuple[str, ...] = tuple(METHODS)
    swept: tuple[str, ...] = ("lora_lego", "lego_balanced", "truncate")
    factors: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0)
    validation: int = 200
    test: int = 500
    inputs: int = 64
    gauge: float = 0.7
    trials: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if unknown := [name for name in self.methods if name not in METHODS]:
            message = f"there is no method {unknown[0]!r}{nearest(unknown[0], METHODS)}; choose from {list(METHODS)}."
            raise ValueError(message)
        if missing := {"lora_lego", "linear"} - {*self.methods}:
            raise ValueError(f"methods must have {min(missing)!r}, with which others are compared.")
        if not self.swept or not {*self.swept} <= {*self.methods}:
            raise ValueError(f"swept must name one or more of the methods, not {list(self.swept)}.")
        if len(self.ranks) != len(self.language.tasks) or min(self.ranks) < 1:
            message = f"{len(self.language.tasks)} tasks need as many ranks from 1 on, not {list(self.ranks)}."
            raise ValueError(message)
        if self.trials < 1 or not self.factors:
            raise ValueError("trials must be at least 1, and there must be one factor or more.")


class _Taught(NamedTuple):
    """A base model, an adapter for each task, and one for all of them."""

    model: Model
    adapters: list[Adapter]
    joint: Adapter
    lessons: list[Examples]


def run(config: LoraTasksConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and methods.

    Returns:
        Metrics, tables and figures.
    """
    seeds = [config.seed + number for number in range(config.trials)]
    net, rng = network(config.language, config.size), np.random.default_rng(config.seed)
    data = config.language.examples(config.language.meanings, config.foundation, rng)
    test = config.language.examples(config.language.meanings, config.test, rng)
    models = train_bases(net, data, test, config.base, seeds, out, progress)
    taught = _teach(config, models, seeds, progress)
    progress.start("merging", len(seeds) * steps(config.methods))
    trials = {seed: _trial(config, one, seed, progress) for seed, one in zip(seeds, taught, strict=True)}
    progress.done()
    return report(config, Trials(trials))


def _teach(config: LoraTasksConfig, models: Sequence[Model], seeds: Sequence[int], progress: Any) -> list[_Taught]:
    """Train all adapters; the last of each seed is the one for all tasks, of the largest rank."""
    language, tasks = config.language, config.language.tasks
    progress.start(f"training {len(seeds)} times {len(tasks) + 1} adapters", len(seeds))
    found = []
    for seed, model in zip(seeds, models, strict=True):
        rng = np.random.default_rng((seed, 1))
        options = (config.adapter.examples, config.adapter.replayed, rng)
        lessons = [language.lessons(some, *options) for some in (*((task,) for task in tasks), tasks)]
        ranks = (*config.ranks, max(config.ranks))
        *adapters, joint = train_adapters(model, lessons, ranks, config.adapter, jax.random.key(seed))
        found.append(_Taught(model, adapters, joint, lessons[:-1]))
        progress.step(1)
    progress.done()
    return found


def _trial(config: LoraTasksConfig, taught: _Taught, seed: int, progress: Any) -> Trial:
    rng = np.random.default_rng((seed, 2))
    validation, test = (config.language.trials(count, rng) for count in (config.validation, config.test))
    judge = Judge(taught.model, validation, test, config.factors, sum(config.ranks))
    inputs = module_inputs(taught.model, taught.adapters, taught.lessons, config.inputs)
    bench = Bench(judge, taught.adapters, inputs, config.methods, config.swept, config.gauge, seed)
    found = measure(bench, progress)
    return Trial(_references(judge, taught) | found.scores, found.changes)


def _references(judge: Judge, taught: _Taught) -> dict[str, Score]:
    """Each adapter on its own task, the one for all tasks, and the base model."""
    each = [judge.score(adapter, 1.0) for adapter in taught.adapters]
    own = np.array([score.tasks[number] for number, score in enumerate(each)])
    kept = float(np.mean([score.kept for score in each]))
    base = judge.accuracies(taught.joint, (0.0,), judge.test)[0]
    return {
        "individual": Score(own, kept, 1.0, own, kept),
        "joint": judge.score(taught.joint, 1.0),
        "base": Score(base[:-1], float(base[-1]), 1.0, base[:-1], float(base[-1])),
    }


EXPERIMENT = Experiment(LoraTasksConfig, run)
