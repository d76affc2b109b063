"""Merges of plain LoRA adapters against peft, module by module."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch", reason="torch is not installed; parity needs the extra `parity`.")
peft = pytest.importorskip("peft", reason="peft is not installed; parity needs the extra `parity`.")

from permjax.lora.merge import merge_loras  # noqa: E402
from permjax.lora.methods import lora_method  # noqa: E402
from permjax.lora.pool import Factors  # noqa: E402

RANK, ALPHA = 4, 6
POSITIVE, MIXED = (0.7, 1.3, 0.4), (0.7, -1.3, 0.4)
NAMES = ("first", "second", "third")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(24, 32), torch.nn.Linear(32, 20)


@pytest.fixture
def tuned():
    """A peft model with three random adapters of equal rank and scale."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.PeftModel(Net(), config, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def modules(model):
    return {name: one for name, one in model.named_modules() if hasattr(one, "lora_A")}


def factors(layer, name):
    return layer.lora_A[name].weight.detach().numpy(), layer.lora_B[name].weight.detach().numpy()


def adapters_of(model):
    root = np.float32(np.sqrt(ALPHA / RANK))
    return [
        {name: Factors(*(root * x for x in factors(one, adapter))) for name, one in modules(model).items()}
        for adapter in NAMES
    ]


def compare(model, kind, chosen, weights, ours=None, **options):
    """Hold the merged updates of peft's `kind` against those of a method."""
    model.add_weighted_adapter([*NAMES], [*weights], "merged", combination_type=kind, **options)
    found = merge_loras(adapters_of(model), chosen, weights=ours or weights)
    for name, one in modules(model).items():
        expected = one.get_delta_weight("merged").detach().numpy()
        error = np.linalg.norm(found[name].b @ found[name].a - expected) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)


def shared(weights):
    """The weights of which T times are peft's: methods that elect signs count 1 / T as one."""
    return [w / len(weights) for w in weights]


@pytest.mark.parametrize("weights", [POSITIVE, MIXED])
@pytest.mark.parametrize(("kind", "name"), [("cat", "concat"), ("svd", "truncate"), ("linear", "linear")])
def test_sums_are_those_of_peft(tuned, kind, name, weights):
    compare(tuned, kind, lora_method(name), weights)


@pytest.mark.parametrize("weights", [POSITIVE, MIXED])
@pytest.mark.parametrize(("kind", "name"), [("magnitude_prune", "magnitude"), ("magnitude_prune_svd", "magnitude_svd")])
def test_magnitude_pruning_is_that_of_peft(tuned, kind, name, weights):
    compare(tuned, kind, lora_method(name, density=0.4), weights, density=0.4)


@pytest.mark.parametrize("weights", [POSITIVE, MIXED])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize(("kind", "name"), [("ties", "ties"), ("ties_svd", "ties_svd")])
def test_ties_is_that_of_peft(tuned, kind, name, majority, weights):
    chosen = lora_method(name, density=0.4, majority=majority)
    compare(tuned, kind, chosen, weights, shared(weights), density=0.4, majority_sign_method=majority)


@pytest.mark.parametrize(("combine", "kind"), [("linear", "dare_linear"), ("ties", "dare_ties")])
@pytest.mark.parametrize("space", ["", "_svd"])
def test_dare_that_drops_nothing_is_that_of_peft(tuned, combine, kind, space):
    weights = shared(POSITIVE) if combine == "ties" else POSITIVE
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        compare(
            tuned,
            kind + space,
            lora_method(f"dare{space}", density=1.0, combine=combine),
            POSITIVE,
            weights,
            density=1.0,
        )


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_drops_and_rescales_as_peft_does(rescale):
    from peft.utils.merge_utils import random_pruning

    values = np.random.default_rng(0).uniform(1, 2, (64, 300)).astype(np.float32)
    theirs = random_pruning(torch.from_numpy(values), 0.3, rescale).numpy()
    chosen = lora_method("dare", density=0.3, rescale=rescale)
    ours = np.asarray(merge_loras([{"m": Factors(values, np.ones((2, 64), np.float32))}], chosen)["m"].a)
    for found in (ours, theirs):
        kept = found != 0
        assert abs(kept.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / kept.size)
        np.testing.assert_allclose(found[kept], values[kept] / (0.3 if rescale else 1), rtol=1e-6)
