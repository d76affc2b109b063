import dataclasses

import pytest

from permjax.edit.places import layer_count, mlp_place
from permjax.edit.presets import PREFIXES, PRESETS, preset, scale_free
from permjax.nets.gpt import GPT2Config
from permjax.nets.llama import LlamaConfig

pytestmark = pytest.mark.fast

MODELS = {
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "llama2-7b": LlamaConfig(),
    "llama3-8b": LlamaConfig(num_key_value_heads=8, intermediate_size=14336),
}


def layers_of(editor):
    return getattr(editor, "layers", None) or (editor.layer,)


@pytest.mark.parametrize("editor", PRESETS)
def test_every_preset_names_layers_that_its_model_has(editor):
    for model, settings in PRESETS[editor].items():
        for layer in layers_of(settings):
            assert mlp_place(MODELS[model], layer).weight
        assert PREFIXES[editor] is not None


def test_presets_are_those_of_the_papers():
    rome, memit, alpha = (preset(name, "gpt2-xl") for name in ("rome", "memit", "alphaedit"))
    assert (rome.layer, rome.key, rome.value.steps, rome.value.clamp, rome.value.kl) == (17, "mixed", 20, 4.0, 0.0625)
    assert (memit.layers, memit.weight, memit.value.clamp) == ((13, 14, 15, 16, 17), 20_000.0, 0.75)
    assert (alpha.threshold, alpha.rule, alpha.ridge) == (0.02, "absolute", 10.0)
    assert preset("c_rome", "llama2-7b").key == "mean"
    assert preset("ft_l", "gpt2-medium").limit == 2e-3
    assert sum(count for _, count in PREFIXES["rome"]) == 20


@pytest.mark.parametrize("editor", PRESETS)
def test_scale_free_settings_fit_models_of_any_depth(editor):
    for layers in (1, 2, 4, 48):
        settings = scale_free(editor, GPT2Config(n_layer=layers))
        assert all(0 <= layer < layers for layer in layers_of(settings))
        assert layer_count(GPT2Config(n_layer=layers)) == layers
        assert settings == dataclasses.replace(settings)
        assert isinstance(hash(settings), int)


def test_unknown_editors_and_models_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'memitt' is no editor \(nearest: 'memit'\)"):
        preset("memitt", "gpt2-xl")
    with pytest.raises(ValueError, match=r"'gpt2-x' is no model with settings for 'rome' \(nearest: 'gpt2-xl'\)"):
        preset("rome", "gpt2-x")
    with pytest.raises(ValueError, match="'grace' is no editor"):
        scale_free("grace", GPT2Config())
