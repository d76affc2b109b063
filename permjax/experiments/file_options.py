"""What the commands on checkpoint files take."""

from dataclasses import dataclass
from typing import Literal

from permjax.experiments.guard_files import GuardOptions


@dataclass(frozen=True)
class AlignOptions:
    """What to align, and how.

    Attributes:
        models: two or more checkpoints (files, indices or folders); the first is the anchor.
        out: where the aligned model goes: a `.safetensors` file or a folder; with more than two models a folder that
            gets one checkpoint for each but the anchor.
        config: a JSON file with `model_type` and its fields; the `config.json` beside the models by default.
        arch: instead of a configuration, `module:function` that returns `(apply, example_inputs)`.
        matching: what is compared; activations on the calibration data for the method pleas, and weights otherwise.
        calibration: inputs without labels: a `.npz` (the array `x`, or one for each input in order), `.npy` or
            `.safetensors` file, or `generated:white_noise[:N]`.
        samples: how many of the calibration inputs to take; all by default.
        batch_size: calibration inputs at a time.
        solver: of the assignment problems; `auto` takes the quickest exact one that is there.
        seed: of the matching, and of the choice and order of calibration inputs.
        restarts: runs of the matching of weights, of which the best counts.
        plan: also write the permutations to this `.json` or `.safetensors` file.
        init: a plan from which the matching of weights starts, as `plan` writes it.
    """

    models: tuple[str, ...]
    out: str
    config: str | None = None
    arch: str | None = None
    matching: Literal["weights", "activations"] | None = None
    calibration: str | None = None
    samples: int | None = None
    batch_size: int = 100
    solver: Literal["auto", "scipy", "lapx", "optax", "auction"] = "auto"
    seed: int = 0
    restarts: int = 1
    plan: str | None = None
    init: str | None = None

    @property
    def compared(self) -> str:
        """What matching compares, by default too."""
        return self.matching or "weights"

    @property
    def needs_data(self) -> bool:
        """Whether calibration data are used."""
        return self.compared == "activations"


@dataclass(frozen=True)
class PleasOptions:
    """How the method pleas merges; without a size the network gets that of one model.

    Attributes:
        budget: pleas: operations of the merged network as a multiple of one model's, from 1 to the number of models; or
        params: pleas: numbers to store, zero blocks included, as such a multiple; or
        width: pleas: `SHARE` for all groups of units, or `GROUP=SHARE` for one: how much of it every model keeps for
            itself.
        whole: pleas: a group that is not widened, such as that of an embedding that is the output layer as well.
        shape: pleas: how budget or params are spread: evenly, the last layers separate, or by what groups are worth.
        mode: pleas: fit layers to the inputs they get in the models, or in the merged network as fitted so far.
        targets: pleas: what shared units are fitted to: the mean of the models, or what the model says in whose domain
            the sample is (the array `owner` of the calibration file numbers it).
        heads: pleas: one output layer for all, or the own ones of models with other labels, as they are or fitted.
        ridge: pleas: weight of the averaged weights in the fit.
        positions: pleas: use so many random positions of every image in convolutions; all by default.
        canonical_scale: pleas: bring the units of every model to one scale before.
    """

    budget: float | None = None
    params: float | None = None
    width: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    shape: Literal["uniform", "staged", "optimised"] = "uniform"
    mode: Literal["parallel", "sequential"] = "parallel"
    targets: Literal["mean", "owner"] = "mean"
    heads: Literal["shared", "own", "own-fitted"] = "shared"
    ridge: float | Literal["auto", "held-back"] = "auto"
    positions: int | None = None
    canonical_scale: bool = False


@dataclass(frozen=True)
class MergeOptions(AlignOptions):
    """What to merge, and how; the options of `align` are as there.

    Attributes:
        method: the weighted average, a point on the arc between two models, or PLeaS: least squares on calibration
            data into a network of the size you choose.
        weights: one number for each model, for average and slerp; equal ones by default.
        align: whether the models are aligned to the first one before.
        pleas: options of the method pleas.
        watch: options of the guard.
    """

    method: Literal["average", "slerp", "pleas"] = "average"
    weights: tuple[float, ...] | None = None
    align: bool = True
    pleas: PleasOptions = PleasOptions()
    watch: GuardOptions = GuardOptions()

    @property
    def compared(self) -> str:
        """What matching compares, by default too."""
        return self.matching or ("activations" if self.method == "pleas" else "weights")

    @property
    def needs_data(self) -> bool:
        """Whether calibration data are used."""
        return self.method == "pleas" or (self.align and self.compared == "activations")
