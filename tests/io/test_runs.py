"""Run state on disk: what was saved comes back bit by bit, and another run's state is refused."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.io.runs import load_run, save_run

pytestmark = pytest.mark.fast


class Moments(NamedTuple):
    count: jax.Array
    mu: dict


def make_state(scale=1.0):
    weights = {
        "h.0.attn.weight": scale * jnp.arange(6.0).reshape(2, 3),
        "b": jnp.full(2, scale, jnp.bfloat16) / 3,
    }
    return {"params": weights, "optimizer": (Moments(jnp.int32(3), weights), ()), "history": np.array([0.5, np.nan])}


def test_a_state_comes_back_bit_by_bit_in_its_structure(tmp_path):
    state = make_state()
    save_run(tmp_path / "run", 4, state, {"seeds": [0, 1]})
    step, loaded = load_run(tmp_path / "run", state, {"seeds": [0, 1]})
    assert step == 4
    assert isinstance(loaded["optimizer"][0], Moments)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(loaded), strict=True):
        assert before.dtype == after.dtype
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


def test_only_the_last_state_is_kept(tmp_path):
    for step in (1, 2, 3):
        save_run(tmp_path, step, make_state(step), {})
    assert [path.name for path in tmp_path.iterdir()] == ["3"]
    step, loaded = load_run(tmp_path, make_state(), {})
    assert step == 3
    assert float(loaded["params"]["b"][0]) == pytest.approx(1)


def test_where_nothing_was_saved_there_is_no_state(tmp_path):
    assert load_run(tmp_path / "nowhere", make_state(), {}) is None
    assert load_run(tmp_path, make_state(), {}) is None
    assert not (tmp_path / "nowhere").exists()


def test_a_save_that_was_killed_leaves_the_one_before(tmp_path):
    save_run(tmp_path, 1, make_state(), {})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "half").write_bytes(b"written")
    assert load_run(tmp_path, make_state(), {}).step == 1
    save_run(tmp_path, 2, make_state(2), {})
    assert load_run(tmp_path, make_state(), {}).step == 2


def test_the_state_of_another_run_is_refused_with_the_difference(tmp_path):
    save_run(tmp_path, 1, make_state(), {"net": "wide", "seeds": [0, 1]})
    with pytest.raises(ValueError, match=r"another run: its seeds is \[0, 1\], but this run has \[0, 2\]"):
        load_run(tmp_path, make_state(), {"net": "wide", "seeds": [0, 2]})
