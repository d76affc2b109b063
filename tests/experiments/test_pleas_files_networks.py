"""Files of networks with BatchNorm and of Hugging Face folders merged by PLeaS."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from permjax import tree
from permjax.experiments.file_options import MergeOptions, PleasOptions
from permjax.experiments.files import merge
from permjax.io.checkpoint import load_tree, open_checkpoint, save_checkpoint, save_tree
from permjax.merge.export import CONFIG_KEY, load_merged
from permjax.nets.registry import build, config_from_dict

RESNET = {"model_type": "resnet", "input_shape": [4, 4, 2], "channels": [3], "blocks": [1], "classes": 2}
GPT2 = {"model_type": "gpt2", "vocab_size": 7, "n_positions": 6, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 10}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_running_statistics_are_estimated_on_the_calibration_data(tmp_path):
    config = RESNET | {"norm": "batch"}
    net = build(config_from_dict(config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    for seed, name in enumerate("ab"):
        save_tree(f"{name}.safetensors", net.init(jax.random.key(seed)))
    images = 3 + np.random.default_rng(0).standard_normal((20, 4, 4, 2), np.float32)
    np.save("x.npy", images)
    outcome = merge(
        MergeOptions(("a.safetensors", "b.safetensors"), "out.safetensors", calibration="x.npy", method="pleas")
    )
    assert outcome.metrics["warnings"] == 0
    found = load_tree("out.safetensors")
    kernel, bias = (found["params"]["Conv_0"][name] for name in ("kernel", "bias"))
    first = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    mean = (np.asarray(first) + bias).mean((0, 1, 2))
    np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["mean"], mean, rtol=1e-4, atol=1e-4)


def test_a_hugging_face_folder_keeps_its_names_constants_shards_and_tokenizer(tmp_path):
    net = build(config_from_dict(GPT2))
    for seed, folder in enumerate(("one", "two")):
        named = {f"transformer.{name}": leaf for name, leaf in net.init(jax.random.key(seed)).items()}
        named["transformer.h.0.attn.bias"] = np.tri(6, dtype=np.float32)[None, None]
        save_checkpoint(tmp_path / folder, named, metadata={"format": "pt", "note": folder}, shard_size=800)
        for file, text in {"config.json": json.dumps(GPT2), "tokenizer.json": folder}.items():
            (tmp_path / folder / file).write_text(text)
    np.save("x.npy", np.random.default_rng(0).integers(0, 7, (20, 6)))
    options = MergeOptions(("one", "two"), "out", calibration="x.npy", method="pleas")
    with pytest.raises(ValueError, match=r"wte.weight.*keep group 'transformer.h.0.attn.c_attn.weight:0' whole"):
        merge(replace(options, pleas=PleasOptions(budget=1.3)))
    assert not (tmp_path / "out").exists()
    how = PleasOptions(budget=1.3, whole=("transformer.h.0.attn.c_attn.weight:0",))
    merge(replace(options, pleas=how))
    one, out = open_checkpoint("one"), open_checkpoint("out")
    assert set(out) == set(one)
    assert len(out.shards) > 2
    assert out.metadata["note"] == "one"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "one"
    assert out.config == GPT2 | {"prefix": "transformer.", CONFIG_KEY: out.config[CONFIG_KEY]}
    assert out.config[CONFIG_KEY]["widths"]
    of_parents = {key: value for key, value in out.config.items() if key != CONFIG_KEY}
    network_of = build(config_from_dict(of_parents))
    params, network = load_merged("out", network_of.apply)
    assert "transformer.h.0.attn.bias" not in tree.flatten(params)
    assert network(params, *net.example_inputs(2)).shape == (2, 6, 7)
