"""Configurations: what is read comes back, and nothing is silently misread."""

import jax
import pytest

from permjax.nets.registry import ARCHITECTURES, ConfigError, build, config_from_dict, config_to_dict

pytestmark = pytest.mark.fast

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.35.0",
    "use_cache": True,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_configuration_survives_the_way_through_a_dictionary(name):
    config = config_from_dict({"model_type": name})
    values = config_to_dict(config)
    assert config_from_dict(values) == config
    assert not any(isinstance(value, tuple) for value in values.values())


def test_lists_become_tuples_and_whole_numbers_floats():
    assert config_from_dict({"model_type": "vgg", "layers": [8, "M"]}).layers == (8, "M")
    theta = config_from_dict({"model_type": "llama", "rope_theta": 500000}).rope_theta
    assert isinstance(theta, float)
    assert theta == 500000


def test_equal_configurations_give_the_same_functions_so_that_jit_compiles_once():
    values = {"model_type": "mlp", "hidden": [7]}
    first, second = (build(config_from_dict(values)) for _ in range(2))
    assert first.apply is second.apply
    assert build(config_from_dict(values | {"hidden": [6]})).apply is not first.apply
    run = jax.jit(lambda apply, params, x: apply(params, x), static_argnums=0)
    params = first.init(jax.random.key(0))
    for net in (first, second):
        run(net.apply, params, *net.example_inputs(1))
    assert run._cache_size() == 1


def test_published_configurations_of_hugging_face_are_read():
    gpt = config_from_dict(GPT2)
    assert (gpt.n_embd, gpt.n_head, gpt.inner, gpt.tie_word_embeddings) == (768, 12, 3072, True)
    llama = config_from_dict(LLAMA)
    assert (llama.kv_heads, llama.head_width, llama.rms_norm_eps) == (4, 64, 1e-5)


def test_the_rotary_base_is_read_from_either_spelling():
    new = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert config_from_dict(new).rope_theta == 5e5


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (GPT2, "activation_function", "relu"),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "scale_attn_weights", False),
        (GPT2, "add_cross_attention", True),
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "mlp_bias", True),
        (LLAMA, "rope_scaling", {"type": "linear", "factor": 2.0}),
        (LLAMA, "rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
        (LLAMA, "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
)
def test_a_key_that_asks_for_other_mathematics_is_refused_by_name(base, key, value):
    with pytest.raises(ConfigError, match=f"'{key}' is"):
        config_from_dict(base | {key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names no 'model_type'"),
        ({"model_type": "gpt3"}, "'gpt3' is unknown.*'gpt2'"),
        ({"model_type": "mlp", "hiden": [3]}, "unknown key 'hiden'.*'hidden'"),
        ({"model_type": "gpt2", "n_layers": 3}, "unknown key 'n_layers'.*'n_layer'"),
        ({"model_type": "llama", "quantization_config": {}}, "unknown key 'quantization_config'"),
        ({"model_type": "mlp", "hidden": 3}, r"'hidden' must be a list, each item int, not 3 \(int\)"),
        ({"model_type": "mlp", "hidden": [3, 2.5]}, "'hidden' must be"),
        ({"model_type": "mlp", "classes": True}, "'classes' must be int, not True"),
        ({"model_type": "mlp", "norm": "batch"}, "'norm' must be one of 'none', 'layer', not 'batch'"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "'rms_norm_eps' must be float"),
        ({"model_type": "gpt2", "n_inner": "many"}, "'n_inner' must be int | None"),
        ({"model_type": "gpt2", "n_head": 7}, "'n_head' is 7, which does not divide"),
        ({"model_type": "gpt2", "prefix": "model."}, "'prefix' must be"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "'num_key_value_heads' is 5, which does not divide"),
        ({"model_type": "llama", "num_attention_heads": 24}, "give 'head_dim'"),
        ({"model_type": "llama", "head_dim": 7}, "head width is 7"),
        ({"model_type": "vgg", "layers": [8, "P"]}, "'layers' holds 'P'"),
        ({"model_type": "resnet", "blocks": [1]}, "'channels' names 3 stages and 'blocks' 1"),
        ({"model_type": "vit", "patch": 5}, "'patch' is 5"),
        ({"model_type": "vit", "heads": 5}, "'heads' is 5"),
    ],
)
def test_a_wrong_configuration_is_refused_with_a_sentence(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)
