"""Adapter files against PEFT: what it writes is read as it means it, what permjax writes it loads as it is meant."""

import copy
import json
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed; parity needs the extra `parity`.")
peft = pytest.importorskip("peft", reason="peft is not installed; parity needs the extra `parity`.")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; parity needs `parity`.")

from peft.tuners.lora import LoraLayer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from permjax.lora.formats import AdapterError, open_adapter, save_adapter  # noqa: E402
from permjax.lora.merge import merge_loras  # noqa: E402
from permjax.lora.methods import METHODS  # noqa: E402

LLAMA = {
    **{"vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False},
}


class Zoo(torch.nn.Module):
    """One module of each kind; block.fc is the end of no other path, fc is."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 8)
        self.block = torch.nn.ModuleDict({"fc": torch.nn.Linear(8, 12), "c1d": Conv1D(10, 12)})
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"fc": torch.nn.Linear(10, 10)}) for _ in range(2))
        self.conv = torch.nn.Conv2d(1, 4, (3, 2))
        self.point = torch.nn.Conv2d(4, 3, 1)

    def forward(self, tokens):
        x = self.block["c1d"](torch.tanh(self.block["fc"](self.embed(tokens))))
        for one in self.blocks:
            x = torch.tanh(one["fc"](x))
        return self.point(self.conv(x[:, None]))


def base(kind):
    """A model with the same random weights at every call."""
    torch.manual_seed(0)
    if kind == "zoo":
        return Zoo().eval()
    if kind == "gpt2":
        sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()


def adapter(folder, kind, seed=1, dtype=torch.float32, **config):
    """A PEFT adapter with random factors, written by PEFT; returns the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(kind), peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.data = weight.data.normal_(0, 0.3, generator=generator).to(dtype)
        model.save_pretrained(folder)
    return model.eval()


def loaded(folder, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as missing or unexpected keys
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        return peft.PeftModel.from_pretrained(base(kind), folder).eval()


def peft_deltas(model):
    """The updates of all modules as matrices [out, in], in the orientation of the factors."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            flip = isinstance(module.get_base_layer(), Conv1D | torch.nn.Embedding)
            delta = module.get_delta_weight("default").detach().float()
            found[name.removeprefix("base_model.model.")] = (delta.T if flip else delta.flatten(1)).numpy()
    return found


def deltas(files):
    return {name: one.b @ one.a for name, one in files.factors().items()}


def logits(model, kind):
    tokens = torch.tensor(np.random.default_rng(3).integers(0, 11, (2, 7)))
    with torch.no_grad():
        found = model(tokens)
    return (found if kind == "zoo" else found.logits).numpy()


def close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert np.abs(delta).max() > 0.01
        np.testing.assert_allclose(found[name], delta, atol=atol, rtol=0)


CASES = {
    "linear": ("zoo", {"r": 4, "lora_alpha": 8, "target_modules": ["fc"]}),
    "every kind": ("zoo", {"r": 3, "lora_alpha": 5, "target_modules": ["fc", "c1d", "conv", "point", "embed"]}),
    "rslora": ("zoo", {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["fc", "conv", "embed"]}),
    "patterns": (
        "zoo",
        {
            **{"r": 4, "lora_alpha": 6, "target_modules": ["fc", "conv", "point"]},
            **{"rank_pattern": {"block.fc": 2, r"blocks\.\d.fc": 3, "^point": 1}, "use_rslora": True},
            **{"alpha_pattern": {"1.fc": 7, "fc": 5, "oint": 2}},
        },
    ),
    "regex": ("zoo", {"r": 2, "lora_alpha": 2, "target_modules": r"blocks\.\d\.fc|.*c1d", "fan_in_fan_out": True}),
    "gpt2": ("gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "wte"], "task_type": "CAUSAL_LM"}),
    "one layer": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "layers_to_transform": [1]}),
    "without": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    ),
    "embeddings": ("llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "lora_alpha": 3}),
    "all": ("llama", {"r": 2, "target_modules": "all-linear", "init_lora_weights": "orthogonal", "lora_dropout": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("uniform", [True, False])
def test_adapters_of_peft_are_read_and_written_as_peft_means_them(tmp_path, case, uniform):
    kind, config = CASES[case]
    theirs = adapter(tmp_path / "x", kind, **config)
    files = open_adapter(tmp_path / "x")
    close(deltas(files), peft_deltas(theirs), 1e-6)
    assert len(files.frozen) == (2 if case == "embeddings" else 0)
    save_adapter(tmp_path / "y", files.factors(), like=[files], uniform=uniform)
    again = loaded(tmp_path / "y", kind)
    close(peft_deltas(again), peft_deltas(theirs), 2e-6)
    assert np.abs(logits(theirs, kind) - logits(base(kind), kind)).max() > 1e-3
    np.testing.assert_allclose(logits(again, kind), logits(theirs, kind), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_peft_reads_it(tmp_path, dtype):
    theirs = adapter(tmp_path / "x", "zoo", dtype=dtype, r=4, lora_alpha=8, target_modules=["fc", "conv", "embed"])
    files = open_adapter(tmp_path / "x")
    widened = {name: module.float() for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    assert widened
    close(deltas(files), peft_deltas(theirs), 1e-6)
    save_adapter(tmp_path / "y", files.factors(), like=[files])
    again = open_adapter(tmp_path / "y")
    assert {info.dtype.name for info in again.values()} == {str(dtype).removeprefix("torch.")}
    close(peft_deltas(loaded(tmp_path / "y", "zoo").float()), peft_deltas(theirs), 2e-2)


@pytest.mark.parametrize("uniform", [True, False])
def test_a_merge_of_mixed_adapters_has_the_logits_of_the_sum(tmp_path, uniform):
    settings = [
        {"r": 4, "lora_alpha": 8, "target_modules": ["fc", "c1d", "conv", "embed"]},
        {
            "r": 6,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": r".*fc|point|embed",
            "rank_pattern": {"point": 1},
        },
    ]
    theirs = [adapter(tmp_path / str(i), "zoo", seed=i, **config) for i, config in enumerate(settings)]
    files = [open_adapter(tmp_path / str(i)) for i in range(2)]
    merged = merge_loras([one.factors() for one in files], METHODS["concat"](), weights=[0.7, -0.4])
    save_adapter(tmp_path / "y", merged, like=files, uniform=uniform)
    one, two = map(peft_deltas, theirs)
    expected = {name: 0.7 * one.get(name, 0) - 0.4 * two.get(name, 0) for name in {**one, **two}}
    again = loaded(tmp_path / "y", "zoo")
    close(peft_deltas(again), expected, 1e-5)
    np.testing.assert_allclose(logits(again, "zoo"), logits(with_deltas(expected), "zoo"), atol=1e-4)


def test_configurations_for_diffusers_make_the_layers_that_the_tensors_need(tmp_path):
    theirs = adapter(tmp_path / "x", "zoo", r=4, lora_alpha=8, target_modules=["fc", "conv"], rank_pattern={"conv": 2})
    files = open_adapter(tmp_path / "x")
    named = {f"unet.{name}": one for name, one in files.factors().items()}
    unet = files.renamed({name: f"unet.{name}" for name in files})
    save_adapter(tmp_path / "y.safetensors", named, like=[unet], style="diffusers", uniform=False)
    written = open_adapter(tmp_path / "y.safetensors")
    config = json.loads(written.metadata["lora_adapter_metadata"])
    own = {key.removeprefix("unet."): value for key, value in config.items()}
    model = peft.inject_adapter_in_model(peft.LoraConfig(**own), base("zoo"))
    tensors = load_file(tmp_path / "y.safetensors")
    result = peft.set_peft_model_state_dict(model, {key.removeprefix("unet."): x for key, x in tensors.items()})
    assert not result.unexpected_keys
    close(peft_deltas(model), peft_deltas(theirs), 2e-6)


def with_deltas(expected):
    """The base model with updates added to its weights."""
    model = copy.deepcopy(base("zoo"))
    with torch.no_grad():
        for name, delta in expected.items():
            module = model.get_submodule(name)
            flip = isinstance(module, Conv1D | torch.nn.Embedding)
            module.weight += torch.tensor(delta.T if flip else delta).reshape(module.weight.shape)
    return model


@pytest.mark.parametrize(
    ("kind", "config", "word"),
    [
        ("zoo", {"target_modules": ["fc"], "use_dora": True}, "use_dora"),
        ("zoo", {"target_modules": ["fc"], "lora_bias": True}, "lora_bias"),
        ("zoo", {"target_modules": ["fc"], "bias": "lora_only"}, "bias"),
        ("zoo", {"target_modules": ["fc"], "modules_to_save": ["conv"]}, "modules_to_save"),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token_indices"),
        ("zoo", {"target_modules": ["fc"], "init_lora_weights": "pissa"}, "init_lora_weights"),
        ("zoo", {"target_modules": [], "target_parameters": ["block.fc.weight"]}, "target_parameters"),
    ],
)
def test_what_peft_writes_beyond_plain_updates_is_refused(tmp_path, kind, config, word):
    adapter(tmp_path / "x", kind, r=4, **config)
    with pytest.raises(AdapterError, match=word):
        open_adapter(tmp_path / "x")


def test_other_types_and_names_of_adapters_are_refused(tmp_path):
    model = peft.get_peft_model(base("zoo"), peft.LoHaConfig(r=2, target_modules=["fc"]))
    model.save_pretrained(tmp_path / "loha")
    with pytest.raises(AdapterError, match="peft_type is 'LOHA'"):
        open_adapter(tmp_path / "loha")
    model = peft.get_peft_model(base("zoo"), peft.LoraConfig(target_modules=["fc"]), adapter_name="french")
    model.save_pretrained(tmp_path / "named")
    with pytest.raises(AdapterError, match="one of its folders instead: french"):
        open_adapter(tmp_path / "named")
    assert len(open_adapter(tmp_path / "named/french")) == 3
