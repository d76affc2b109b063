"""Files of LoRA adapters: the public names for reading and writing them.

PEFT folders, and single files with the keys of kohya's scripts or of diffusers. Whatever is more than an update
`scale * B A` is refused by name.
"""

from pathlib import Path

from permjax.io.lazy import INDEX as MODEL_INDEX
from permjax.io.lazy import PICKLES, Checkpoint, StrPath, open_checkpoint
from permjax.lora.adapter_files import AdapterFiles, read_peft, read_single
from permjax.lora.keys import AdapterError, ModuleInfo, one_line
from permjax.lora.kohya import common_names
from permjax.lora.saving import CONFIG, WEIGHTS, save_adapter

__all__ = ["AdapterError", "AdapterFiles", "ModuleInfo", "common_names", "open_adapter", "save_adapter"]

INDEX = MODEL_INDEX.replace("model", "adapter_model", 1)


def open_adapter(path: StrPath, *, force: bool = False) -> AdapterFiles:
    """Open an adapter without reading its tensors.

    The scale of a module is alpha / r, or alpha / sqrt(r) with `use_rslora`, with PEFT's rules for `rank_pattern` and
    `alpha_pattern`; in single files alpha / rank with the tensor alpha, the configuration in the header where there is
    one, and 1 otherwise.

    Args:
        path: a PEFT folder, or a `.safetensors` file: kohya's, diffusers', or the one in a PEFT folder.
        force: ignore unknown keys and unknown initialisations in a configuration, which is harmless only if they have
            no effect on the update; what is known to change it is refused all the same.

    Raises:
        AdapterError: there is none, a file is damaged, or it holds more than updates `scale * B A`: DoRA, trained
            biases, tokens or modules, grouped convolutions, LoKr, LoHa, initialisations that change the base model.

    Example:
        >>> adapter = open_adapter("my-adapter")  # doctest: +SKIP
        >>> adapter["model.layers.0.self_attn.q_proj"].rank  # doctest: +SKIP
        16
    """
    path = Path(path)
    with one_line():
        folder = _peft_folder(path)
        if folder is None:
            return read_single(path, open_checkpoint(path), force)
        return read_peft(folder, _weights(folder), folder / CONFIG, force)


def _peft_folder(path: Path) -> Path | None:
    """The PEFT folder that a path stands for, or None for a single file."""
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise AdapterError(f"Folder {path} has no {CONFIG}{_hint(path)}.")
        return path
    belongs = path.name == CONFIG or (path.name in (WEIGHTS, INDEX) and (path.parent / CONFIG).is_file())
    return path.parent if belongs and path.is_file() else None


def _hint(folder: Path) -> str:
    """What to give in place of a folder that is no adapter."""
    inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
    if inner:
        return f"; give one of its folders instead: {', '.join(inner)}"
    single = sorted(file.name for file in folder.glob("*.safetensors") if file.name != WEIGHTS)
    return f"; give one of its files instead: {', '.join(single)}" if single else "; give the folder of a PEFT adapter"


def _weights(folder: Path) -> Checkpoint:
    """The tensors of a PEFT folder; a pickle is refused."""
    for name in (WEIGHTS, INDEX, *(f"adapter_model{suffix}" for suffix in PICKLES)):
        if (folder / name).is_file():
            return open_checkpoint(folder / name)
    raise AdapterError(f"Folder {folder} has a {CONFIG} but no {WEIGHTS}; copy or download it again.")
