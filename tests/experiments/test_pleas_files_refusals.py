"""What `merge --method pleas` cannot do is refused in one line with exit status 2, and nothing is written."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from permjax.cli import main
from permjax.experiments.file_options import MergeOptions, PleasOptions
from permjax.experiments.files import merge
from permjax.io.checkpoint import save_tree
from permjax.nets.registry import build, config_from_dict

pytestmark = pytest.mark.fast

MLP = {"model_type": "mlp", "input_shape": [4], "hidden": [8, 6], "classes": 3}
X = np.random.default_rng(0).standard_normal((20, 4), np.float32)
PLEAS = {"method": "pleas", "calibration": "x.npz"}
MATCHED = {"matching": "activations", "calibration": "x.npz"}


def sized(**how):
    return PLEAS | {"pleas": PleasOptions(**how)}


REFUSED = {
    "no calibration": ({"method": "pleas"}, r"give --calibration FILE .*generated:white_noise"),
    "no calibration for activations": ({"matching": "activations"}, "give --calibration FILE"),
    "calibration that nothing reads": ({"calibration": "x.npz"}, "only read by --matching activations and --method"),
    "no such file": (PLEAS | {"calibration": "y.npz"}, r"--calibration y\.npz cannot be read"),
    "NaN": (PLEAS | {"calibration": "nan.npz"}, r"nan\.npz: the array 'x' holds 1 numbers that are NaN"),
    "other shape": (PLEAS | {"calibration": "wide.npz"}, r"wide\.npz: .* shape \(20, 5\), .* takes \[samples, 4\]"),
    "other noise": (PLEAS | {"calibration": "generated:noise"}, "what can be generated"),
    "more samples": (PLEAS | {"samples": 21}, r"--samples 21 cannot be drawn from the 20 of x\.npz"),
    "no batches": (PLEAS | {"batch_size": 0}, "batch_size must be at least 1"),
    "weights": (PLEAS | {"weights": (0.5, 0.5)}, "--weights are for the methods average and slerp"),
    "restarts of activations": (PLEAS | {"restarts": 2}, "add --matching weights"),
    "start of activations": (MATCHED | {"init": "plan.json"}, "--restarts and --init"),
    "budget of an average": ({"pleas": PleasOptions(budget=1.2)}, "--budget is for the method pleas; add --method"),
    "scale of an average": ({"pleas": PleasOptions(canonical_scale=True)}, "--canonical-scale is for the method pleas"),
    "plan of nothing": (PLEAS | {"align": False, "plan": "plan.json"}, "no plan to write"),
    "budget too small": (sized(budget=0.9), r"budget is 0\.9, but must lie in \[1, 2\]"),
    "budget too large": (sized(budget=2.1), r"budget is 2\.1, but must lie in \[1, 2\]"),
    "params too large": (sized(params=4.1), r"params is 4\.1, but must lie in \[1, 4\]"),
    "two sizes": (sized(budget=1.2, params=1.2), "exactly one of budget, params and width, not budget and params"),
    "unknown group": (sized(width=("Dense_0=0.5",)), "no group 'Dense_0'"),
    "width out of range": (sized(width=("1.5",)), r"ratio is 1\.5, but must lie in \[0, 1\]"),
    "width no number": (sized(width=("half",)), r"--width half must be SHARE or GROUP=SHARE"),
    "unknown whole group": (sized(budget=1.2, whole=("x",)), "no group 'x' that could be kept apart or whole"),
    "no owners": (PLEAS | {"pleas": PleasOptions(targets="owner")}, r"x\.npz is: add an array 'owner'"),
    "merged already": (PLEAS | {"models": ("a.safetensors", "m.safetensors")}, r"m\.safetensors is a merged network"),
    "average of a merged one": ({"models": ("m.safetensors", "a.safetensors")}, r"m\.safetensors is a merged network"),
    "out is an input": (PLEAS | {"out": "b.safetensors"}, r"over the model b\.safetensors"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of two models, a network merged from them, and calibration files."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "config.json").write_text(json.dumps(MLP))
    names = []
    for seed, name in enumerate("ab"):
        names.append(str(folder / f"{name}.safetensors"))
        save_tree(names[-1], build(config_from_dict(MLP)).init(jax.random.key(seed)))
    np.savez(folder / "x.npz", x=X)
    np.savez(folder / "wide.npz", x=np.ones((20, 5), np.float32))
    np.savez(folder / "nan.npz", x=np.where(np.arange(80).reshape(20, 4) == 3, np.nan, X))
    how = PleasOptions(budget=1.3)
    merge(
        MergeOptions(
            tuple(names), str(folder / "m.safetensors"), method="pleas", calibration=str(folder / "x.npz"), pleas=how
        )
    )
    return folder


def everything_in(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(files, monkeypatch, case):
    monkeypatch.chdir(files)
    changes, pattern = REFUSED[case]
    before = everything_in(files)
    options = {"models": ("a.safetensors", "b.safetensors"), "out": "out.safetensors"} | changes
    with pytest.raises(ValueError, match=pattern) as caught:
        merge(MergeOptions(**options))
    assert "\n" not in str(caught.value)
    assert everything_in(files) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "pleas"], "give --calibration FILE"),
        (["--method", "pleas", "--calibration", "nan.npz"], "nan.npz: the array 'x' holds 1 numbers that are NaN"),
        (["--budget", "1.2"], "--budget is for the method pleas"),
        (["--method", "pleas", "--budget", "3", "--calibration", "x.npz"], "budget is 3.0"),
        (["--method", "pleas", "--budget", "much"], "budget"),
        (["--method", "pleas", "--mode", "backwards"], "parallel"),
    ],
)
def test_the_command_says_so_with_exit_status_2(files, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(files)
    before = everything_in(files)
    assert main(["merge", "a.safetensors", "b.safetensors", "-o", "out.safetensors", *flags]) == 2
    found = capsys.readouterr()
    assert said in found.err
    assert found.out == ""
    assert everything_in(files) == before


def test_align_refuses_a_merged_network_as_well(files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    assert main(["align", "a.safetensors", "m.safetensors", "-o", "out.safetensors"]) == 2
    assert "m.safetensors is a merged network" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()


def test_heads_that_are_no_units_cannot_be_own_ones(files, monkeypatch):
    monkeypatch.chdir(files)
    Path("summed.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def apply(p, x):\n"
        "    w = p['params']\n"
        "    for i in range(3):\n"
        "        x = jax.nn.relu(x @ w[f'Dense_{i}']['kernel'] + w[f'Dense_{i}']['bias'][None])\n"
        "    return x.sum(-1)[:, None] * jnp.arange(3.0)[None]\n"
        "def build():\n"
        "    return apply, jnp.ones((2, 4))\n"
    )
    options = MergeOptions(
        ("a.safetensors", "b.safetensors"), "o.safetensors", arch="summed:build", **sized(heads="own")
    )
    with pytest.raises(ValueError, match="--heads own cannot be had: the outputs of `apply` are no units"):
        merge(options)
    assert not Path("o.safetensors").exists()
