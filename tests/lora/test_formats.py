"""Adapter files: what is read is `scale * B A`, what is written is read again, by strict readers too."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from permjax.lora.formats import AdapterError, AdapterFiles, common_names, open_adapter, save_adapter
from permjax.lora.merge import merge_loras
from permjax.lora.methods import METHODS
from permjax.lora.pool import Factors, Merged

pytestmark = pytest.mark.fast

RNG = np.random.default_rng(0)
BASE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"], "base_model_name_or_path": "tiny"}


def normal(*shape, dtype=np.float32):
    return RNG.standard_normal(shape).astype(dtype)


def linear(name, rank=4, size_in=5, size_out=6, dtype=np.float32):
    key = f"base_model.model.{name}"
    a, b = normal(rank, size_in, dtype=dtype), normal(size_out, rank, dtype=dtype)
    return {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}


def conv(name, rank=4, kernel=(3, 2)):
    key = f"base_model.model.{name}"
    return {f"{key}.lora_A.weight": normal(rank, 5, *kernel), f"{key}.lora_B.weight": normal(6, rank, 1, 1)}


def embedding(name, rank=4):
    key = f"base_model.model.{name}"
    return {f"{key}.lora_embedding_A": normal(rank, 9), f"{key}.lora_embedding_B": normal(6, rank)}


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(BASE | config))
    return folder


def kohya(path, names, alpha=2.0, **sizes):
    tensors = {}
    for name in names:
        a, b = linear(name, **sizes).values()
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.asarray(alpha, np.float32)
    save_file(tensors, path, metadata={"ss_v2": "False", "ss_tag_frequency": "private"})
    return path


def deltas(adapter: AdapterFiles) -> dict[str, np.ndarray]:
    return {name: np.float64(one.b) @ np.float64(one.a) for name, one in adapter.factors().items()}


def strict(folder) -> dict[str, np.ndarray]:
    """A reader that knows `r`, `lora_alpha`, `use_rslora` and the keys of factors, and nothing else."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    pairs = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert key.startswith("base_model.model.")
        name, _, role = key.removeprefix("base_model.model.").rpartition(".lora_")
        assert role in ("A.weight", "B.weight", "embedding_A", "embedding_B")
        assert config["r"] in tensor.shape[:2]
        pairs.setdefault(name, {})[role.removesuffix(".weight")[-1]] = tensor.astype(np.float64)
    flat = {name: (x["A"].reshape(len(x["A"]), -1), x["B"].reshape(len(x["B"]), -1)) for name, x in pairs.items()}
    return {name: scale * b @ a for name, (a, b) in flat.items()}


def close(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], delta, rtol=rtol, atol=rtol * np.abs(delta).max())


# scales


def test_a_delta_is_alpha_over_r_times_b_a(tmp_path):
    tensors = linear("m.q")
    adapter = open_adapter(write(tmp_path / "x", tensors))
    a, b = tensors.values()
    close(deltas(adapter), {"m.q": 2 * np.float64(b) @ np.float64(a)})
    info, read = adapter["m.q"], adapter.read("m.q")
    assert (info.kind, info.rank, info.scale, info.size_in, info.size_out) == ("linear", 4, 2.0, 5, 6)
    assert read.a.dtype == read.b.dtype == np.float32
    np.testing.assert_allclose(read.a, a * np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": -8}, -2.0),
        ({"lora_alpha": 0}, 0.0),
        ({"alpha_pattern": {"q": 2}}, 0.5),
        ({"alpha_pattern": {"m": 2}}, 2.0),
        ({"alpha_pattern": {"^q": 2, "m.q": 12, "q": 1}}, 3.0),
        ({"alpha_pattern": {r"m\.[qv]": 12}, "use_rslora": True}, 6.0),
        ({"r": 9, "rank_pattern": {"q": 4}}, 2.0),
        ({"r": 9, "rank_pattern": {".*q": 4, "m.q": 3}, "lora_alpha": 6}, 1.5),
    ],
)
def test_the_scale_follows_the_rules_of_peft(tmp_path, config, scale):
    tensors = linear("m.q")
    adapter = open_adapter(write(tmp_path / "x", tensors, **config))
    assert adapter["m.q"].scale == pytest.approx(scale)
    a, b = tensors.values()
    close(deltas(adapter), {"m.q": scale * np.float64(b) @ np.float64(a)})


@pytest.mark.parametrize(("alpha", "scale"), [(2.0, 0.5), (None, 1.0), (4.0, 1.0)])
def test_the_scale_of_kohya_is_alpha_over_rank_and_one_without_alpha(tmp_path, alpha, scale):
    adapter = open_adapter(kohya(tmp_path / "x.safetensors", ["lora_unet_down_q"], alpha))
    assert (adapter.style, adapter.config) == ("kohya", {})
    assert adapter["lora_unet_down_q"].scale == scale


def test_the_scale_of_diffusers_stands_in_the_header_by_component(tmp_path):
    tensors = {
        k.replace("base_model.model.", ""): x for k, x in (linear("unet.a.q") | linear("text_encoder.a.q")).items()
    }
    configs = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"a.q": 12}, "unet.use_rslora": False}
    for text, scales in [({}, (1, 1)), (configs, (3, 1)), ({"r": 4, "lora_alpha": 8}, (2, 2))]:
        header = {"lora_adapter_metadata": json.dumps(text)} if text else None
        save_file(tensors, tmp_path / "x.safetensors", metadata=header)
        adapter = open_adapter(tmp_path / "x.safetensors")
        assert adapter.style == "diffusers"
        assert (adapter["unet.a.q"].scale, adapter["text_encoder.a.q"].scale) == scales


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_half_precision_is_read_exactly_and_written_again(tmp_path, dtype):
    tensors = linear("m.q", dtype=dtype)
    adapter = open_adapter(write(tmp_path / "x", tensors, lora_alpha=4))
    np.testing.assert_array_equal(
        adapter.read("m.q").a, tensors["base_model.model.m.q.lora_A.weight"].astype(np.float32)
    )
    save_adapter(tmp_path / "y", adapter.factors(), like=[adapter])
    written = load_file(tmp_path / "y/adapter_model.safetensors")
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key], tensor, strict=True)


# round trips


@pytest.mark.parametrize("uniform", [True, False])
def test_every_kind_and_rank_comes_back_from_a_peft_folder(tmp_path, uniform):
    tensors = linear("m.q", 2) | conv("m.c", 4) | conv("m.one", 3, (1, 1)) | embedding("m.e", 3) | linear("v", 1)
    ranks = {"m.q": 2, "m.one": 3, "e": 3, "v": 1}
    first = open_adapter(write(tmp_path / "x", tensors, rank_pattern=ranks, use_rslora=True))
    assert {name: info.kind for name, info in first.items()} == {
        **{"m.q": "linear", "m.c": "conv", "m.one": "conv", "m.e": "embedding", "v": "linear"}
    }
    save_adapter(tmp_path / "y", first.factors(), like=[first], uniform=uniform)
    second = open_adapter(tmp_path / "y")
    close(deltas(second), deltas(first))
    assert second["m.c"] == type(second["m.c"])("conv", 4, 1.0, (4, 5, 3, 2), (6, 4, 1, 1), np.dtype(np.float32))
    assert [one.rank for one in second.values()] == ([4] * 5 if uniform else [first[name].rank for name in second])
    assert second.config["rank_pattern"] == second.config["alpha_pattern"]
    assert bool(second.config["rank_pattern"]) is not uniform
    if uniform:
        close(strict(tmp_path / "y"), deltas(first))


def test_patterns_give_every_module_its_own_rank_even_where_names_end_alike(tmp_path):
    names = {"q": 1, "m.q": 2, "x.m.q": 4, "mxq": 3, "y.q": 4}
    factors = {name: Factors(normal(rank, 5), normal(6, rank)) for name, rank in names.items()}
    save_adapter(tmp_path / "y", factors, like=[], uniform=False)
    found = open_adapter(tmp_path / "y")
    assert {name: info.rank for name, info in found.items()} == names
    assert found.config["r"] == found.config["lora_alpha"] == 4
    close(deltas(found), {name: np.float64(one.b) @ np.float64(one.a) for name, one in factors.items()})


def test_kohya_files_come_back_with_one_alpha_for_each_module(tmp_path):
    first = open_adapter(kohya(tmp_path / "x.safetensors", ["lora_unet_q", "lora_te_v"], alpha=-3.0))
    for uniform in (True, False):
        mixed = dict(first.factors())
        mixed["lora_te_v"] = Factors(mixed["lora_te_v"].a[:2], mixed["lora_te_v"].b[:, :2])
        save_adapter(tmp_path / "y.safetensors", mixed, like=[first], uniform=uniform)
        second = open_adapter(tmp_path / "y.safetensors")
        assert [one.scale for one in second.values()] == [1.0, 1.0]
        assert sorted(one.rank for one in second.values()) == ([4, 4] if uniform else [2, 4])
        close(deltas(second), {name: np.float64(one.b) @ np.float64(one.a) for name, one in mixed.items()})
        written = load_file(tmp_path / "y.safetensors")
        assert {float(written[f"{name}.alpha"]) for name in first} == ({4.0} if uniform else {2.0, 4.0})
        assert second.metadata["ss_network_dim"] == ("4" if uniform else "Dynamic")
        assert second.metadata["ss_v2"] == "False"
        assert "ss_tag_frequency" not in second.metadata


def test_diffusers_files_keep_their_keys_and_say_ranks_where_they_differ(tmp_path):
    tensors = {k.replace("base_model.model.", ""): x for k, x in (linear("unet.a.q") | linear("unet.b.q")).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    first = open_adapter(tmp_path / "x.safetensors")
    save_adapter(tmp_path / "y.safetensors", first.factors(), like=[first])
    assert load_file(tmp_path / "y.safetensors").keys() == tensors.keys()
    assert open_adapter(tmp_path / "y.safetensors").metadata == {"format": "pt"}
    mixed = first.factors()
    mixed["unet.a.q"] = Factors(mixed["unet.a.q"].a[:2], mixed["unet.a.q"].b[:, :2])
    save_adapter(tmp_path / "z.safetensors", mixed, like=[first], uniform=False)
    third = open_adapter(tmp_path / "z.safetensors")
    config = json.loads(third.metadata["lora_adapter_metadata"])
    assert config["unet.rank_pattern"] == config["unet.alpha_pattern"] == {"a.q": 2, "b.q": 4}
    close(deltas(third), {name: np.float64(one.b) @ np.float64(one.a) for name, one in mixed.items()})
    save_adapter(tmp_path / "w.safetensors", third.factors(), like=[third])
    assert json.loads(open_adapter(tmp_path / "w.safetensors").metadata["lora_adapter_metadata"])["unet.r"] == 4


def test_adapters_are_written_in_the_style_that_is_asked_for(tmp_path):
    first = open_adapter(write(tmp_path / "x", linear("unet.a.q") | conv("text_encoder.v")))
    save_adapter(tmp_path / "k.safetensors", first.factors(), like=[first], style="kohya")
    second = open_adapter(tmp_path / "k.safetensors")
    assert set(second) == {"lora_unet_a_q", "lora_te_v"}
    named = common_names([second, first])[0]
    close(deltas(named), deltas(first))
    assert named.style == "kohya"
    save_adapter(tmp_path / "d.safetensors", named.factors(), like=[named], style="diffusers")
    close(deltas(open_adapter(tmp_path / "d.safetensors")), deltas(first))
    save_adapter(tmp_path / "k2.safetensors", named.factors(), like=[named])
    assert set(open_adapter(tmp_path / "k2.safetensors")) == set(second)


def test_two_text_encoders_are_numbered_in_kohya_files(tmp_path):
    pair = Factors(normal(4, 5), normal(6, 4))
    for names, first in [(["text_encoder.q"], "lora_te_q"), (["text_encoder.q", "text_encoder_2.q"], "lora_te1_q")]:
        save_adapter(tmp_path / "k.safetensors", dict.fromkeys(names, pair), like=[], style="kohya")
        found = open_adapter(tmp_path / "k.safetensors")
        assert set(found) == {first, "lora_te2_q"} if len(names) == 2 else set(found) == {first}
        dotted = {key: x for name in names for key, x in linear(name).items()}
        assert set(common_names([found, open_adapter(write(tmp_path / "x", dotted))])[0]) == set(names)


def test_without_adapters_the_factors_have_the_shapes_of_the_file(tmp_path):
    kernel = Merged(jnp.asarray(normal(4, 5, 3, 3)), jnp.asarray(normal(6, 4, 1, 1)))
    save_adapter(tmp_path / "y", {"c": kernel, "m.q": Factors(normal(2, 5), normal(6, 2))}, like=())
    found = open_adapter(tmp_path / "y")
    assert (found["c"].kind, found["c"].a_shape, found["m.q"].a_shape) == ("conv", (4, 5, 3, 3), (4, 5))
    np.testing.assert_array_equal(found.read("c").a, np.reshape(kernel.a, (4, 45)))


def test_a_file_in_a_peft_folder_stands_for_the_folder_and_shards_are_read(tmp_path):
    folder = write(tmp_path / "x", linear("m.q") | linear("m.v"))
    expected = deltas(open_adapter(folder))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert open_adapter(folder / name).path == folder
    tensors = load_file(folder / "adapter_model.safetensors")
    places = {key: f"part-{number}.safetensors" for number, key in enumerate(tensors)}
    for key, file in places.items():
        save_file({key: tensors[key]}, folder / file)
    (folder / "adapter_model.safetensors").unlink()
    index = folder / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    close(deltas(open_adapter(folder)), expected)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(places, "../x/part-0.safetensors")}))
    with pytest.raises(AdapterError, match="no plain file name"):
        open_adapter(folder)


# names and targets


def test_names_of_kohya_become_those_of_the_other_adapter(tmp_path):
    dotted = open_adapter(write(tmp_path / "x", linear("down_blocks.0.to_q") | linear("down_blocks.0.to_v")))
    other = open_adapter(kohya(tmp_path / "k.safetensors", ["lora_unet_down_blocks_0_to_q", "lora_unet_mid_to_q"]))
    same, named = common_names([dotted, other])
    assert same is dotted
    assert set(named) == {"down_blocks.0.to_q", "lora_unet_mid_to_q"}
    np.testing.assert_array_equal(named.read("down_blocks.0.to_q").a, other.read("lora_unet_down_blocks_0_to_q").a)
    assert common_names([other])[0] is other
    with pytest.raises(AdapterError, match="'lora_unet_mid_to_q' has a name of kohya's style"):
        save_adapter(tmp_path / "y", named.factors(), like=[dotted, named])


@pytest.mark.parametrize(
    ("dotted", "underscored", "message"),
    [
        (["a.b_c", "a_b.c"], ["lora_unet_a_b_c"], "may stand for any of"),
        (["layers.q"], ["lora_te1_layers_q", "lora_te2_layers_q"], "all stand for 'layers.q'"),
    ],
)
def test_names_that_are_not_unique_are_refused(tmp_path, dotted, underscored, message):
    tensors = {key: x for name in dotted for key, x in linear(name).items()}
    first = open_adapter(write(tmp_path / "x", tensors))
    second = open_adapter(kohya(tmp_path / "k.safetensors", underscored))
    with pytest.raises(AdapterError, match=message):
        common_names([first, second])


@pytest.mark.parametrize(
    ("config", "saved", "expected"),
    [
        ({}, ["a.q", "b.q", "b.v"], ["q", "v"]),
        ({}, ["a.q", "b.v"], ["a.q", "v"]),
        ({"layers_to_transform": [0]}, ["a.q", "b.v"], ["a.q", "b.v"]),
        ({"target_modules": ".*[qv]"}, ["a.q", "b.v"], ["a.q", "b.v"]),
        ({}, ["q", "b.v"], r"b\.v|q"),
    ],
)
def test_target_modules_catch_what_is_saved_and_nothing_else(tmp_path, config, saved, expected):
    tensors = {key: x for name in ("a.q", "b.q", "b.v", *saved) for key, x in linear(name).items()}
    adapter = open_adapter(write(tmp_path / "x", tensors, **config))
    save_adapter(tmp_path / "y", adapter.factors(saved), like=[adapter])
    assert open_adapter(tmp_path / "y").config["target_modules"] == expected


def test_the_configuration_keeps_what_is_said_about_the_base_model(tmp_path):
    folder = write(tmp_path / "x", linear("m.q"), fan_in_fan_out=True, task_type="CAUSAL_LM", lora_dropout=0.5)
    adapter = open_adapter(folder)
    save_adapter(tmp_path / "y", adapter.factors(), like=[adapter])
    config = open_adapter(tmp_path / "y").config
    assert (config["base_model_name_or_path"], config["fan_in_fan_out"], config["task_type"]) == (
        "tiny",
        True,
        "CAUSAL_LM",
    )
    assert (config["lora_dropout"], config["r"], config["lora_alpha"]) == (0.0, 4, 4)


def test_a_merge_of_files_is_the_mean_of_their_deltas(tmp_path):
    first = open_adapter(write(tmp_path / "x", linear("m.q") | conv("m.c"), use_rslora=True))
    second = open_adapter(write(tmp_path / "z", linear("m.q", 2) | linear("m.v", 2), r=2))
    merged = merge_loras([first.factors(), second.factors()], METHODS["concat"]())
    save_adapter(tmp_path / "y", merged, like=[first, second])
    one, two = deltas(first), deltas(second)
    mean = {"m.q": (one["m.q"] + two["m.q"]) / 2, "m.c": one["m.c"] / 2, "m.v": two["m.v"] / 2}
    close(deltas(open_adapter(tmp_path / "y")), mean)
    close(strict(tmp_path / "y"), mean)
