"""What is no plain update is refused by name, damaged files too, and a failed write leaves what was there."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import permjax.files
from permjax.lora.formats import AdapterError, open_adapter, save_adapter
from permjax.lora.pool import Factors

pytestmark = pytest.mark.fast

KEY = "base_model.model.m.q"
A, B = f"{KEY}.lora_A.weight", f"{KEY}.lora_B.weight"
BASE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}


def ones(*shape):
    return np.ones(shape, np.float32)


def plain():
    return {A: ones(4, 5), B: ones(6, 4)}


def write(folder, tensors=None, **config):
    folder.mkdir(exist_ok=True)
    save_file(plain() if tensors is None else tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(BASE | config))
    return folder


def refused(*words):
    """One line that has all the words in this order."""
    return pytest.raises(AdapterError, match=r"\A(?!.*\n)" + "".join(".*" + re.escape(word) for word in words))


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# configurations


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["score"]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["experts.down"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("monteclora_config", {"num_samples": 8}),
        ("kasa_config", {"beta": 1e-4}),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("megatron_config", {"x": 1}),
        ("ensure_weight_tying", True),
        ("peft_type", "LOHA"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_what_changes_the_update_is_refused_with_force_too(tmp_path, key, value, force):
    write(tmp_path / "x", **{key: value})
    with refused("adapter_config.json", key):
        open_adapter(tmp_path / "x", force=force)


@pytest.mark.parametrize(("key", "value"), [("new_trick", 0.5), ("init_lora_weights", "new"), ("new_trick", {"a": 1})])
def test_unknown_entries_are_refused_unless_forced(tmp_path, key, value):
    write(tmp_path / "x", **{key: value})
    with refused("adapter_config.json", key, "force"):
        open_adapter(tmp_path / "x")
    assert open_adapter(tmp_path / "x", force=True)["m.q"].scale == 2.0


def test_entries_that_are_off_or_for_training_only_are_read(tmp_path):
    off = {"use_dora": False, "modules_to_save": None, "new_trick": None, "another": {}, "layer_replication": []}
    training = {
        **{"init_lora_weights": "orthogonal", "lora_dropout": 0.1, "velora_config": {"scale": 1.0}, "bias": "all"},
        **{
            "layers_to_transform": [0],
            "layers_pattern": "layers",
            "exclude_modules": ["k"],
            "runtime_config": {"a": 1},
        },
        **{"loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "megatron_core": "megatron.core"},
    }
    for init in (True, False, "gaussian", "eva", "mica"):
        write(tmp_path / "x", **off | training | {"init_lora_weights": init})
        assert open_adapter(tmp_path / "x")["m.q"].scale == 2.0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, ["'m.q' has rank 4", "8 by r"]),
        ({"rank_pattern": {"q": 2}}, ["'m.q' has rank 4", "2 by r"]),
        ({"r": "4"}, ["r is '4'", "whole number"]),
        ({"r": True}, ["r is True"]),
        ({"lora_alpha": None}, ["lora_alpha is None"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"lora_alpha": 10**400}, ["lora_alpha is 1000"]),
        ({"alpha_pattern": {"q": "x"}}, ["alpha_pattern['q'] is 'x'"]),
        ({"rank_pattern": [1]}, ["rank_pattern is [1]"]),
        ({"rank_pattern": {"(": 4}}, ["rank_pattern", "no regular expression"]),
    ],
)
def test_wrong_numbers_in_the_configuration_are_named(tmp_path, config, words):
    with refused("adapter_config.json", *words):
        open_adapter(write(tmp_path / "x", **config))


# tensors


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (f"{KEY}.lora_magnitude_vector", ["DoRA"]),
        (f"{KEY}.lora_magnitude_vector.weight", ["DoRA"]),
        (f"{KEY}.dora_scale", ["DoRA"]),
        (f"{KEY}.lora_B.bias", ["lora_bias"]),
        (f"{KEY}.bias", ["trained bias"]),
        (f"{KEY}.base_layer.bias", ["trained bias"]),
        ("base_model.model.score.weight", ["whole trained tensor"]),
        ("base_model.model.embed.token_adapter.trainable_tokens_delta", ["trained tokens"]),
        (f"{KEY}.lora_E", ["AdaLoRA"]),
        ("lora_unet_q.lokr_w1", ["LoKr"]),
        ("lora_unet_q.hada_w1_a", ["LoHa"]),
        ("lora_unet_q.oft_blocks", ["OFT"]),
        ("lora_unet_q.lora_mid.weight", ["Tucker"]),
        ("lora_unet_q.diff_b", ["difference"]),
        (f"{KEY}.lora_A.default.weight", ["name of an adapter"]),
        ("unet.q.lora.down.weight", ["old diffusers"]),
        ("something", ["no part of a LoRA"]),
        ("base_model.model.k.lora_A.weight", ["'k'", "one pair of factors"]),
        ("base_model.model.k.base_layer.weight", ["'k'", "one pair of factors"]),
        ("lora_unet_k.alpha", ["'lora_unet_k'", "one pair of factors"]),
        (f"{KEY}.lora_embedding_A", ["'m.q'", "one pair of factors"]),
        (f"{KEY}.lora_down.weight", ["'m.q'", "two tensors"]),
    ],
)
def test_tensors_that_are_no_factors_are_refused_with_force_too(tmp_path, extra, words):
    write(tmp_path / "x", plain() | {extra: ones(4, 4)})
    with refused("adapter_model.safetensors", *words):
        open_adapter(tmp_path / "x", force=True)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((4, 5), (6, 3), ["(4, 5)", "(6, 3)", "rank 4 and B rank 3"]),
        ((4, 5, 3, 3), (6, 2, 1, 1), ["2 groups"]),
        ((4, 5, 3, 3), (6, 4, 3, 3), ["1 x 1"]),
        ((4, 5, 3, 3), (6, 4), ["no factors of one"]),
        ((4,), (6,), ["no factors of one"]),
        ((0, 5), (6, 0), ["an axis is empty"]),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(tmp_path, a, b, words):
    with refused("'m.q'", *words):
        open_adapter(write(tmp_path / "x", {A: ones(*a), B: ones(*b)}))


def test_a_module_is_not_both_linear_and_an_embedding(tmp_path):
    table = {f"{KEY}.lora_embedding_A": ones(4, 5), f"{KEY}.lora_embedding_B": ones(6, 4)}
    with refused("'m.q'", "one pair of factors"):
        open_adapter(write(tmp_path / "x", plain() | table))


def test_factors_of_whole_numbers_are_refused(tmp_path):
    with refused("'m.q'", "int8", "not quantised"):
        open_adapter(write(tmp_path / "x", plain() | {A: np.ones((4, 5), np.int8)}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found_when_they_are_read(tmp_path, value):
    adapter = open_adapter(write(tmp_path / "x", plain() | {A: np.full((4, 5), value, np.float32)}))
    with refused("adapter_model.safetensors", A, "not finite"):
        adapter.read("m.q")
    with refused("no module 'm.p'", "nearest: 'm.q'"):
        adapter.read("m.p")


def test_an_alpha_is_one_finite_number_and_stands_in_one_place(tmp_path):
    file = tmp_path / "k.safetensors"
    pair = {"lora_unet_q.lora_down.weight": ones(4, 5), "lora_unet_q.lora_up.weight": ones(6, 4)}
    for alpha in (np.asarray(np.nan, np.float32), ones(2)):
        save_file(pair | {"lora_unet_q.alpha": alpha}, file)
        with refused("k.safetensors", "alpha of module 'lora_unet_q'"):
            open_adapter(file)
    both = {"q.lora_A.weight": ones(4, 5), "q.lora_B.weight": ones(6, 4), "q.alpha": np.asarray(2, np.float32)}
    save_file(both, file, metadata={"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 4})})
    with refused("lora_adapter_metadata", "'q'", "'q.alpha'", "remove one"):
        open_adapter(file)
    with refused("adapter_config.json", "'m.q'", "remove one"):
        open_adapter(write(tmp_path / "x", plain() | {f"{KEY}.alpha": np.asarray(2, np.float32)}))


# files


def test_places_without_an_adapter_say_what_to_give(tmp_path):
    with refused("no checkpoint at", "absent"):
        open_adapter(tmp_path / "absent")
    with refused("has no adapter_config.json", "give the folder of a PEFT adapter"):
        open_adapter(tmp_path)
    save_file(plain(), tmp_path / "lora.safetensors")
    with refused("has no adapter_config.json", "lora.safetensors"):
        open_adapter(tmp_path)
    write(tmp_path / "french")
    with refused("has no adapter_config.json", "one of its folders", "french"):
        open_adapter(tmp_path)


def test_peft_keys_without_a_configuration_have_no_scale(tmp_path):
    save_file(plain(), tmp_path / "adapter_model.safetensors")
    with refused("adapter_model.safetensors", "no scale", "adapter_config.json"):
        open_adapter(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"peft_type": "LORA"', "\udcff"])
def test_a_damaged_configuration_is_named(tmp_path, text):
    write(tmp_path / "x")
    (tmp_path / "x/adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with refused("adapter_config.json", "JSON"):
        open_adapter(tmp_path / "x")


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_weights_are_named(tmp_path, size):
    file = write(tmp_path / "x") / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    with refused("adapter_model.safetensors", "whole safetensors file"):
        open_adapter(tmp_path / "x")


def test_pickles_and_missing_and_empty_weights_are_named(tmp_path):
    file = write(tmp_path / "x") / "adapter_model.safetensors"
    save_file({}, file)
    with refused("no tensors of an adapter"):
        open_adapter(tmp_path / "x")
    file.unlink()
    with refused("no adapter_model.safetensors"):
        open_adapter(tmp_path / "x")
    (tmp_path / "x/adapter_model.bin").write_bytes(pickle.dumps({}))
    with refused("adapter_model.bin", "pickle"):
        open_adapter(tmp_path / "x")


# writing


def test_the_same_content_gives_the_same_bytes(tmp_path):
    adapter = open_adapter(write(tmp_path / "x"))
    text = dict.fromkeys("wonderful", "1")
    for name in ("y", "z"):
        save_adapter(tmp_path / name, adapter.factors(), like=[adapter], metadata=text)
        save_adapter(tmp_path / f"{name}.safetensors", adapter.factors(), like=[adapter], style="kohya", metadata=text)
    assert contents(tmp_path / "y") == contents(tmp_path / "z")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "z.safetensors").read_bytes()
    header = open_adapter(tmp_path / "y.safetensors").metadata
    assert header.items() >= text.items()
    assert list(
        json.loads((tmp_path / "y.safetensors").read_bytes()[8:].split(b"}")[0] + b"}}")["__metadata__"]
    ) == sorted(header)
    assert load_file(tmp_path / "y.safetensors")["lora_unet_m_q.alpha"] == 4


@pytest.mark.parametrize(
    ("factors", "options", "words"),
    [
        ({"m.q": (ones(4, 3), ones(6, 4))}, {}, ["'m.q'", "(4, 3)", "[rank, 5]"]),
        ({"m.p": (ones(4, 5), ones(6, 4))}, {}, ["no adapter of `like`", "nearest: 'm.q'"]),
        ({"m.q": (ones(4, 5) * np.nan, ones(6, 4))}, {}, ["'m.q'", "not finite"]),
        ({"m.q": (ones(4, 5) * 1e5, ones(6, 4))}, {"dtype": "float16"}, ["'m.q'", "too large for float16"]),
        ({"m.q": (ones(4, 5), ones(6, 4))}, {"dtype": "int8"}, ["cannot be written as int8"]),
        ({"m.q": (ones(4, 5), ones(6, 4))}, {"dtype": "half a float"}, ["cannot be written as half a float"]),
        ({"m.q": (ones(4, 5), ones(6, 4))}, {"style": "webui"}, ["'webui' is no style"]),
        ({"m.q": (ones(4, 5), ones(6, 4))}, {"style": "kohya"}, ["ends in .safetensors"]),
        ({}, {}, ["no modules"]),
    ],
)
def test_what_cannot_be_written_leaves_the_old_adapter(tmp_path, factors, options, words):
    adapter = open_adapter(write(tmp_path / "x"))
    before = contents(write(tmp_path / "y"))
    modules = {name: Factors(*pair) for name, pair in factors.items()}
    with refused(*words):
        save_adapter(tmp_path / "y", modules, like=[adapter], **options)
    assert contents(tmp_path / "y") == before
    with pytest.raises(AdapterError):
        save_adapter(tmp_path / "new", modules, like=[adapter], **options)
    assert not (tmp_path / "new").exists()


def test_folders_and_files_are_not_confused(tmp_path):
    adapter = open_adapter(write(tmp_path / "x"))
    (tmp_path / "file").touch()
    for place in ("file", "y.safetensors"):
        with refused(place, "PEFT adapters are folders"):
            save_adapter(tmp_path / place, adapter.factors(), like=[adapter])
    with refused("not written", "file"):
        save_adapter(tmp_path / "file/inner", adapter.factors(), like=[adapter])


def test_embeddings_have_no_kohya_key(tmp_path):
    tensors = {f"{KEY}.lora_embedding_A": ones(4, 9), f"{KEY}.lora_embedding_B": ones(6, 4)}
    adapter = open_adapter(write(tmp_path / "x", tensors))
    with refused("'m.q' is an embedding", "write another style"):
        save_adapter(tmp_path / "y.safetensors", adapter.factors(), like=[adapter], style="kohya")


def test_modules_with_one_kohya_name_are_refused(tmp_path):
    pair = Factors(ones(4, 5), ones(6, 4))
    with refused("one name 'lora_unet_a_b_c'", "a.b_c", "a_b.c"):
        save_adapter(tmp_path / "y.safetensors", {"a.b_c": pair, "a_b.c": pair}, like=[], style="kohya")


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch, failing):
    adapter = open_adapter(write(tmp_path / "x"))
    before = contents(write(tmp_path / "y", lora_alpha=3))
    count = iter(range(1, 9))
    settle = permjax.files._settle

    def full(*arguments):
        if next(count) == failing:
            raise OSError(28, "No space left on device")
        settle(*arguments)

    monkeypatch.setattr(permjax.files, "_settle", full)
    with refused("was not written", "No space left", "intact"):
        save_adapter(tmp_path / "y", adapter.factors(), like=[adapter])
    assert contents(tmp_path / "y") == before
    monkeypatch.undo()
    save_adapter(tmp_path / "y", adapter.factors(), like=[adapter])
    assert set(contents(tmp_path / "y")) == {"adapter_config.json", "adapter_model.safetensors"}
    assert open_adapter(tmp_path / "y")["m.q"].scale == 1.0


def test_the_configuration_comes_to_its_place_last(tmp_path, monkeypatch):
    adapter = open_adapter(write(tmp_path / "x"))
    placed = []
    monkeypatch.setattr(
        permjax.files.os, "replace", lambda old, new, go=os.replace: (placed.append(new.name), go(old, new))
    )
    save_adapter(tmp_path / "y", adapter.factors(), like=[adapter])
    assert placed == ["adapter_model.safetensors", "adapter_config.json"]


# copies of embeddings of the base model


def with_copy(value, dtype=np.float32):
    pair = {f"{KEY}.lora_embedding_A": ones(4, 9), f"{KEY}.lora_embedding_B": ones(6, 4)}
    return pair | {f"{KEY}.base_layer.weight": np.full((9, 6), value, dtype)}


def test_copies_of_embeddings_are_carried_over(tmp_path):
    first = open_adapter(write(tmp_path / "x", with_copy(7, np.float16)))
    second = open_adapter(write(tmp_path / "z", {k: x for k, x in with_copy(7).items() if "lora" in k}))
    assert set(first) == {"m.q"}
    save_adapter(tmp_path / "y", first.factors(), like=[second, first])
    written = load_file(tmp_path / "y/adapter_model.safetensors")
    np.testing.assert_array_equal(written[f"{KEY}.base_layer.weight"], np.full((9, 6), 7, np.float16), strict=True)
    assert open_adapter(tmp_path / "y")["m.q"].scale == 1.0


def test_different_copies_of_one_embedding_are_refused(tmp_path):
    adapters = [open_adapter(write(tmp_path / str(value), with_copy(value))) for value in (1, 2)]
    with refused("differ in", "base_layer.weight", "one base model"):
        save_adapter(tmp_path / "y", adapters[0].factors(), like=adapters)
    assert not (tmp_path / "y").exists()
