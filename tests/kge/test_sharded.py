"""Tables in parts: the same losses, gradients, training and ranks on any number of devices and processes.

As a program, this file writes what it finds on its devices: `test_sharded.py OUT DEVICES [PROCESS PORT]`.
"""

import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge import losses
from permjax.kge.batches import examples
from permjax.kge.models import FAMILIES, score_all
from permjax.kge.rank import rank_model
from permjax.kge.sharded import rank_sharded, sharded_programs, train_sharded
from permjax.kge.shards import BLOCK, entity_mesh, init_sharded, shard_params, whole_params
from permjax.kge.train import KgeTraining, train_kge
from permjax.kge.triples import Graph
from permjax.tree import unstack

ENTITIES, RELATIONS = 21, 2
FAMILY = FAMILIES["nfe_1"](dimension=6)
TRAINING = KgeTraining(epochs=3, batch_size=16, gamma=1.0, init_bound=0.5, valid_every=0)
TIED = (2, 9, 20)
QUERIES = np.array([[0, 20, 7, 13, -1], [0, 3, 1, 2, 0], [20, 7, 8, 5, 4]], np.int32)  # heads, relations, tails


def made_up_graph():
    rng = np.random.default_rng(0)
    limits = (ENTITIES, RELATIONS, ENTITIES)
    names = (tuple(f"{letter}{i}" for i in range(n)) for letter, n in (("e", ENTITIES), ("r", RELATIONS)))
    return Graph("made up", *names, *(rng.integers(0, limits, (n, 3)).astype(np.int32) for n in (50, 12, 15)))


def tables(ties=()):
    """Tables of FAMILY in which some entities are the same as the first."""
    params = FAMILY.init(jax.random.key(3), ENTITIES, 2 * RELATIONS, 0.5)
    return {
        **params,
        "entity": {part: rows.at[jnp.array([*ties], int)].set(rows[0]) for part, rows in params["entity"].items()},
    }


def named(kind, params):
    return {f"{kind} {table} {part}": rows for table, parts in params.items() for part, rows in parts.items()}


def found_on(mesh):
    """Losses, gradients, trained tables and ranks on a mesh, by name."""
    graph, found = made_up_graph(), {}
    trained = train_sharded(FAMILY, graph, TRAINING, seed=1, mesh=mesh)
    found |= {"epochs": trained.loss, **named("trained", whole_params(trained.params, ENTITIES))}
    params = shard_params(tables(), mesh)
    for loss in ("bce_all", "ce_all"):
        programs = sharded_programs(FAMILY, KgeTraining(loss=loss, gamma=1.0), ENTITIES, mesh)
        each, gradient = programs.gradient(params, *QUERIES)
        found |= {f"{loss} losses": np.asarray(each), **named(loss, whole_params(gradient, ENTITIES))}
    ranks = rank_sharded(FAMILY, shard_params(tables(TIED), mesh), graph, batch=7)
    return {**found, **{f"rank {field}": np.asarray(value) for field, value in ranks._asdict().items()}}


# the same on one device, on some, and on many


def losses_and_gradient(family, name, params, queries):
    """The losses of queries, and the gradient of their mean, on one device."""
    heads, relations, tails = map(jnp.asarray, queries)

    def objective(params):
        each = getattr(losses, name)(score_all(family, params, heads, relations) + 1.0, tails)
        return each.mean(), each

    (_, each), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return each, gradient


def expected():
    """The same as `found_on` gives, from the functions for one device."""
    graph = made_up_graph()
    trained = train_kge(FAMILY, graph, TRAINING, seeds=[1])
    found = {"epochs": trained.history["loss"][:, 0], **named("trained", unstack(trained.params)[0])}
    for name in ("bce_all", "ce_all"):
        each, gradient = losses_and_gradient(FAMILY, name, tables(), QUERIES[:, :4])
        found |= {f"{name} losses": np.append(each, 0), **named(name, gradient)}
    ranks = rank_model(FAMILY, tables(TIED), graph)
    assert ranks.ties.any()
    return {**found, **{f"rank {field}": np.asarray(value) for field, value in ranks._asdict().items()}}


@pytest.fixture(scope="module")
def on_one_device():
    return expected()


def assert_as_on_one_device(found, on_one_device):
    """Ranks are the same, everything else is within 1e-5 of its largest value."""
    assert found.keys() == on_one_device.keys()
    for name, value in on_one_device.items():
        allowed = 0 if name.startswith("rank") else 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=allowed, err_msg=name)


@pytest.mark.fast
@pytest.mark.parametrize("devices", [1, 4])
def test_devices_together_find_what_one_finds(devices, on_one_device):
    mesh = entity_mesh(jax.devices()[:devices])
    params = shard_params(tables(), mesh)
    assert {len(part) for part in params["entity"].values()} == {{1: 21, 4: 24}[devices]}  # filled up
    assert_as_on_one_device(found_on(mesh), on_one_device)


@pytest.mark.fast
@pytest.mark.parametrize("loss", ["bce_all", "ce_all"])
def test_rows_in_several_blocks_give_what_one_block_gives(loss):
    family, entities, mesh = FAMILIES["distmult"](dimension=2), 4 * BLOCK + 4000, entity_mesh()
    params = family.init(jax.random.key(0), entities, 4, 1.0)
    queries = np.array([[0, BLOCK + 900, entities - 1], [0, 3, 1], [entities - 1, 2 * BLOCK, 5]], np.int32)
    in_parts = shard_params(params, mesh)
    assert in_parts["entity"]["scale"].addressable_shards[0].data.shape[0] == BLOCK + 1000
    programs = sharded_programs(family, KgeTraining(loss=loss, gamma=1.0), entities, mesh)
    each, gradient = programs.gradient(in_parts, *queries)
    expected_each, expected_gradient = losses_and_gradient(family, loss, params, queries)
    np.testing.assert_allclose(each, expected_each, rtol=1e-5)
    for name, value in named("", whole_params(gradient, entities)).items():
        other = named("", expected_gradient)[name]
        np.testing.assert_allclose(value, other, rtol=0, atol=1e-5 * np.abs(other).max(), err_msg=name)


def programs_run(tmp_path, *arguments):
    """Run this file as programs at the same time, and read what the first one wrote."""
    outs = [str(tmp_path / f"{i}.npz") for i in range(len(arguments))]
    commands = [[sys.executable, __file__, out, *more] for out, more in zip(outs, arguments, strict=True)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    for process in running:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    return [dict(np.load(out)) for out in outs]


def test_eight_devices_find_what_one_finds(tmp_path, on_one_device):
    (found,) = programs_run(tmp_path, ["8"])
    assert found.pop("devices") == 8
    assert_as_on_one_device(found, on_one_device)


def test_two_processes_find_what_one_finds(tmp_path, on_one_device):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for found in programs_run(tmp_path, ["2", "0", port], ["2", "1", port]):
        assert found.pop("devices") == 4
        assert_as_on_one_device(found, on_one_device)


# what travels


def collectives(compiled):
    """The names of all collective operations of a program, each with the elements of its result."""
    found = re.findall(r"= (\S+) (all-\w+|reduce-scatter|collective-\w+|ragged-\S+?)(?:-start)?\(", compiled.as_text())
    return [(name, int(np.prod([int(n) for n in re.findall(r"\d+(?=[,\]])", shape)]))) for shape, name in found]


@pytest.mark.fast
@pytest.mark.parametrize(("loss", "more"), [("bce_all", []), ("ce_all", [5, 5])])
def test_a_step_sums_two_small_arrays_over_devices_and_moves_nothing_else(loss, more):
    queries, width = QUERIES.shape[1], 2 * FAMILY.dimension
    small = sorted([queries * width, queries * (width + 2), *more])  # rows of heads; loss and gradient of the query
    mesh = entity_mesh()
    training = KgeTraining(loss=loss)
    programs = sharded_programs(FAMILY, training, ENTITIES, mesh)
    params = shard_params(tables(), mesh)
    compiled = programs.gradient.lower(params, *QUERIES).compile()
    assert sorted(collectives(compiled), key=lambda one: one[1]) == [("all-reduce", n) for n in small]
    found = examples(made_up_graph(), grouped=False)
    ids = np.arange(10, dtype=np.int32).reshape(2, queries)
    compiled = programs.advance.lower(programs.begin(params), ids, np.float32(0.1), found).compile()
    assert sorted(collectives(compiled), key=lambda one: one[1]) == [("all-reduce", n) for n in small]


# tables


@pytest.mark.fast
def test_rows_are_drawn_on_their_devices_as_they_are_on_one():
    mesh = entity_mesh()
    drawn = init_sharded(FAMILY, jax.random.key(3), ENTITIES, 2 * RELATIONS, 0.5, mesh)
    assert {len(part.addressable_shards[0].data) for part in drawn["entity"].values()} == {6}
    for name, rows in named("", whole_params(drawn, ENTITIES)).items():
        np.testing.assert_array_equal(rows, named("", tables())[name])


@pytest.mark.fast
def test_moments_lie_where_their_rows_are():
    mesh = entity_mesh()
    state = sharded_programs(FAMILY, TRAINING, ENTITIES, mesh).begin(shard_params(tables(), mesh))
    for part in (*state.moments.mu["entity"].values(), *state.moments.nu["entity"].values()):
        assert len(part.addressable_shards[0].data) == 6


# bad input


@pytest.mark.fast
@pytest.mark.parametrize("settings", [{"loss": "k_vs_all"}, {"loss": "negatives"}, {"n3": 0.1}])
def test_other_losses_are_refused(settings):
    with pytest.raises(ValueError, match="losses bce_all and ce_all without n3"):
        sharded_programs(FAMILY, KgeTraining(**settings), ENTITIES, entity_mesh())


@pytest.mark.fast
def test_a_score_that_is_no_number_is_an_error_whichever_device_has_it():
    params = tables()
    params["entity"]["mean"] = params["entity"]["mean"].at[20, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"a score of the query .* is NaN"):
        rank_sharded(FAMILY, shard_params(params, entity_mesh()), made_up_graph(), batch=7)


if __name__ == "__main__":
    out, devices, *process = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    if process:
        jax.distributed.initialize(f"localhost:{process[1]}", num_processes=2, process_id=int(process[0]))
    np.savez(out, devices=len(jax.devices()), **found_on(entity_mesh()))
