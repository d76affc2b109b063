"""Merge networks of different initialisation into one of a chosen size, by PLeaS, its baselines and its controls."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from permjax.experiments.networks import NetworksConfig, joined, load_data
from permjax.experiments.pleas_calibration import calibration, foreign_calibration
from permjax.experiments.pleas_methods import RECIPES, Distillation, Merger
from permjax.experiments.pleas_parents import Trained, train_joint, train_parents
from permjax.experiments.pleas_report import About, report
from permjax.experiments.pleas_rows import Row
from permjax.experiments.pleas_scores import Scores, accuracies, by_head, ensemble, parents_accuracy, predictions, probe
from permjax.experiments.pleas_tasks import Scenario, Task, make_task
from permjax.experiments.registry import Experiment
from permjax.nets.base import Net
from permjax.nets.registry import build
from permjax.report import Outcome
from permjax.symmetry.spec import PermutationSpec
from permjax.symmetry.trace import trace_spec
from permjax.train import TrainConfig

_COSTLY = ("distill_merged", "distill_scratch")
_LEARNED = tuple(method for method in RECIPES if method != "pleas_free")


@dataclass(frozen=True)
class PleasConfig(NetworksConfig):
    """An experiment on merging two networks of different initialisation.

    Attributes:
        scenario: what the parents learn: `classes` (label spaces of their own), `halves`, `domains` or `bases`.
        scenarios: several to run one after the other in its place; metrics then end in their names.
        methods: what to compare; see `permjax.experiments.pleas_rows.METHODS`.
        budgets: costs of the merged network in percent of one parent's FLOPs, block-sparse.
        control_budgets: budgets at which the distillation controls are run.
        pairs: number of pairs of parents; results are means over pairs.
        calibration: unlabelled training images of both parents to match and fit with.
        calibration_batch: of these at a time.
        free: inputs that are not the task's, for the method `pleas_free`: `white_noise`, `smooth_noise` or a data set.
        heads: own heads are `reused` as they are or `refitted` by least squares; shared ones are always fitted.
        probe_methods: methods that are also scored by linear probes, which are trained with labels.
        probe_budgets: budgets for these.
        shape: how a budget is spread over groups: `uniform`, `staged` or `optimised`.
        ridge: weight of the averaged weights in the fits; by the number of samples where None.
        positions: random positions of every calibration image that count in the fits of convolutions; all where None.
        distillation: hyper-parameters of the distillation controls.
        base: how the bases of the scenario `bases` are trained.
    """

    experiment: ClassVar[str] = "pleas"
    scenario: Scenario = "classes"
    scenarios: tuple[Scenario, ...] = ()
    methods: tuple[str, ...] = _LEARNED
    budgets: tuple[int, ...] = (100, 120, 150, 200)
    control_budgets: tuple[int, ...] = (100, 150)
    pairs: int = 1
    calibration: int = 1000
    calibration_batch: int = 250
    free: str | None = None
    heads: Literal["reused", "refitted"] = "reused"
    probe_methods: tuple[str, ...] = ()
    probe_budgets: tuple[int, ...] = (100,)
    shape: Literal["uniform", "staged", "optimised"] = "uniform"
    ridge: float | None = None
    positions: int | None = None
    distillation: Distillation = Distillation()
    base: TrainConfig | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if unknown := [m for m in (*self.methods, *self.probe_methods) if m not in RECIPES]:
            raise ValueError(f"there is no method {unknown[0]!r}; choose from {list(RECIPES)}.")
        if self.pairs < 1 or not self.budgets or any(not 100 <= b <= 200 for b in self.budgets):
            raise ValueError("pairs must be at least 1, and budgets one or more numbers from 100 to 200 (percent).")
        if "pleas_free" in self.methods and self.free is None:
            raise ValueError("the method 'pleas_free' needs the setting `free`: the data that it is calibrated on.")

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods, PLeaS-free among them where it has data."""
        free = ("pleas_free",) if self.free is not None and "pleas_free" not in self.methods else ()
        return (*self.methods, *free)


def run(config: PleasConfig, out: Path, progress: Any) -> Outcome:
    """Run the experiment.

    Args:
        config: what to do.
        out: folder of the run; training keeps its state in `out/state`, so that an interrupted run goes on.
        progress: told about training and methods.

    Returns:
        Metrics, tables, figures, spec, and the parents of the first pair; `permjax merge` merges them.
    """
    if not config.scenarios:
        return _run_one(config, out, progress)
    variants = {name: replace(config, scenario=name, scenarios=()) for name in config.scenarios}
    return joined({name: _run_one(one, out / "state" / name, progress) for name, one in variants.items()})


def _run_one(config: PleasConfig, out: Path, progress: Any) -> Outcome:
    data = load_data(config.data, build(config.model))
    task = make_task(data, config.scenario)
    seeds = [config.seed + i for i in range(config.pairs)]
    parents = train_parents(config, task, seeds, out, progress, base=config.base)
    joint = train_joint(config, task, seeds, out, progress)
    spec = trace_spec(parents.net.apply, parents.models[0][0], jnp.asarray(task.test[0].x[:2]))
    progress.start("methods", len(seeds) * len(config.compared) * len(config.budgets))
    trials, kept, words = {}, {}, ("", "")
    for number, seed in enumerate(seeds):
        pair = _Pair(config, task, parents.net, spec, parents.models[number], seed)
        trials[seed], merged = pair.rows(progress)
        trials[seed] |= pair.references(joint, number)
        kept, words = kept or merged, pair.words
    progress.done()
    protocol = "shared" if task.heads == "shared" else "refitted" if config.heads == "refitted" else "own"
    about = About(task, spec, words[0], protocol, words[1], kept)
    return report(config, about, trials)


class _Pair:
    """One pair of parents, and all that is measured on it."""

    def __init__(
        self, config: PleasConfig, task: Task, net: Net, spec: PermutationSpec, models: Sequence[Any], seed: int
    ) -> None:
        seen = calibration(task, config.calibration, seed)
        foreign = None
        if config.free is not None:
            foreign = foreign_calibration(task, config.free, config.calibration, seed, config.data.root)
        self.config, self.task, self.net = config, task, net
        self.words = (seen.source, foreign.source if foreign else "")
        self.merger = Merger(
            net,
            spec,
            tuple(models),
            seen,
            foreign,
            config.calibration_batch,
            own=task.heads == "own",
            refit=config.heads == "refitted",
            key=jax.random.key(seed),
            shape=config.shape,
            ridge="auto" if config.ridge is None else config.ridge,
            positions=config.positions,
            distillation=config.distillation,
        )

    def rows(self, progress: Any) -> tuple[dict[Row, Scores], dict[str, Any]]:
        """Return the scores of all methods, and the parents, to be saved."""
        found: dict[Row, Scores] = {}
        kept = {"a": self.merger.models[0], "b": self.merger.models[1]}
        for method in self.config.compared:
            for budget in self.config.budgets:
                progress.step(1, method=f"{method} {budget}")
                if method in _COSTLY and budget not in self.config.control_budgets:
                    continue
                merged = self.merger.merge(method, budget)
                found[method, budget] = self._scored(method, budget, merged)
        return found, kept

    def references(self, joint: Trained, number: int) -> dict[Row, Scores]:
        """Return the scores of the parents, of both together, and of the network trained jointly."""
        x, task = self.task.joint_test.x, self.task
        outputs = [predictions(self.net.apply, model, x) for model in self.merger.models]
        one = self.merger.parent_cost()
        cost = {"flops": float(one.flops), "dense_params": one.dense_params}
        both = {"flops": 2.0 * one.flops, "dense_params": 2 * one.dense_params}
        logits = predictions(joint.net.apply, joint.models[number], x)
        return {
            ("parents", None): Scores(task=parents_accuracy(task, outputs), **cost),
            ("ensemble", None): Scores(**ensemble(task, outputs)._asdict(), **both),
            ("ensemble_softmax", None): Scores(**ensemble(task, outputs, softmax=True)._asdict(), **both),
            ("joint_trained", None): Scores(**accuracies(task, by_head(task, logits))._asdict(), **cost),
        }

    def _scored(self, method: str, budget: int, merged: Any) -> Scores:
        task = self.task
        logits = predictions(merged.network, merged.params, task.joint_test.x, compiled=False)
        found = accuracies(task, by_head(task, logits))
        return Scores(
            task=found.task,
            joint=found.joint,
            flops=float(merged.cost.flops),
            dense_params=merged.cost.dense_params,
            seconds=merged.seconds,
            probe=self._probed(method, budget, merged),
            residuals=merged.residuals,
        )

    def _probed(self, method: str, budget: int, merged: Any) -> float | None:
        if method not in self.config.probe_methods or budget not in self.config.probe_budgets:
            return None
        sets = (self.task.joint_train, self.task.joint_test)
        train, test = (
            predictions(merged.network.last_features, merged.params, part.x, compiled=False) for part in sets
        )
        return probe(self.task, train, test)


EXPERIMENT = Experiment(PleasConfig, run)
