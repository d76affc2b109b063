"""The state of a run on disk, through Orbax: the last complete step survives a kill at any moment."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from permjax import tree


class RunState(NamedTuple):
    """What `load_run` finds: the step after which the state was saved, and the state."""

    step: int
    state: PyTree


def save_run(folder: str | Path, step: int, state: PyTree, about: dict[str, Any]) -> None:
    """Save the state after `step`, then drop the one before.

    Args:
        folder: made where missing; it holds nothing else.
        step: a number above those saved before.
        state: a pytree of arrays.
        about: JSON values that say what the run is, so that a resumed run can compare them with its own.
    """
    with _manager(folder) as manager:
        state_item = ocp.args.StandardSave(tree.flatten(state))  # pyright: ignore[reportCallIssue]
        about_item = ocp.args.JsonSave(about)  # pyright: ignore[reportCallIssue]
        manager.save(step, args=ocp.args.Composite(state=state_item, about=about_item))


def load_run(folder: str | Path, like: PyTree, about: dict[str, Any]) -> RunState | None:
    """The last complete state in a folder, or None where there is none.

    Args:
        folder: as given to `save_run`.
        like: a pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes to expect.
        about: what the run is now; it must equal what was saved.

    Raises:
        ValueError: the folder holds the state of another run; says in what they differ.
    """
    if not Path(folder).is_dir():
        return None
    wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tree.flatten(like).items()}
    with _manager(folder) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        _check(folder, about, manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"])
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]  # pyright: ignore[reportCallIssue]
    return RunState(step, tree.unflatten(like, state))


def _manager(folder: str | Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager(Path(folder).resolve(), options=options, item_names=("state", "about"))


def _check(folder: str | Path, here: dict[str, Any], there: dict[str, Any]) -> None:
    for key in here:
        if here[key] != there.get(key):
            message = (
                f"The folder {folder} holds the state of another run: its {key} is {there.get(key)!r}, "
                f"but this run has {here[key]!r}; give another folder, or remove this one to start again."
            )
            raise ValueError(message)
