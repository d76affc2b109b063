"""Language models in Hugging Face folders: configuration, weights and tokenizer together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from permjax.experiments.architectures import FilesError, find_architecture
from permjax.io.checkpoint import Checkpoint, open_checkpoint
from permjax.io.tokenizers import FileTokenizer, check_size, load_tokenizer
from permjax.nets.base import Net
from permjax.nets.registry import build, config_from_dict


class LanguageFiles(NamedTuple):
    """A language model from files.

    Attributes:
        net: the network of its configuration.
        params: its weights under their names in the files, in float32.
        tokenizer: its tokenizer, which adds nothing by itself.
        config: its `config.json`.
        checkpoint: the files, for the names and companions of what is saved.
    """

    net: Net
    params: dict[str, Any]
    tokenizer: FileTokenizer
    config: Mapping[str, Any]
    checkpoint: Checkpoint


def open_language_model(folder: str | Path) -> LanguageFiles:
    """A GPT-2 or Llama-like model of a folder with `config.json`, `tokenizer.json` and safetensors.

    Raises:
        FilesError: the configuration is missing or of another network, a leaf is missing or has another shape, or the
            tokenizer is missing, damaged, or of another model.
    """
    checkpoint = open_checkpoint(folder)
    architecture = find_architecture((checkpoint,), None, None)
    net = build(config_from_dict(architecture.config or {}))
    if not hasattr(net.config, "vocab_size"):
        raise FilesError(f"{folder} holds no language model, but {architecture.source}; give one with a tokenizer.")
    params = {name: jnp.asarray(np.asarray(checkpoint[name], np.float32)) for name in architecture.like}
    try:
        tokenizer = load_tokenizer(folder, special=False)
        check_size(tokenizer, net.config.vocab_size)
    except (OSError, ValueError) as error:
        raise FilesError(f"{folder}: {error}") from None
    return LanguageFiles(net, params, tokenizer, checkpoint.config or {}, checkpoint)
