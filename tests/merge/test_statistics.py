"""Statistics in place of data: they add up, can be kept, and lead to the same network."""

import dataclasses

import jax
import numpy as np
import pytest
import zoo

from permjax.merge.gram import save_grams
from permjax.merge.partial import partial_plan
from permjax.merge.pleas import pleas, pleas_statistics
from permjax.merge.statistics import Statistics
from permjax.symmetry.trace import trace_spec

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("ordinary_promotion")]

X = np.asarray(zoo.image(90, 4, 4, 2))
DATA = [X[:30], X[30:60], X[60:]]
LIKE = {"k": zoo.shape(3, 3, 2, 6), "b": zoo.shape(6), "w": zoo.shape(6 * 4, 3)}


def net(p, x):
    h = jax.lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + p["b"]
    return jax.nn.relu(h).reshape(x.shape[0], -1) @ p["w"]


@pytest.fixture(scope="module")
def setting(drawn):
    """(spec, parents, plan)."""
    with jax.numpy_rank_promotion("allow"):
        spec = trace_spec(net, LIKE, X[:1])
    return spec, [drawn(LIKE, 0), drawn(LIKE, 1)], partial_plan(spec, {"k:3": 3})


def collected(setting, data, **options):
    spec, models, plan = setting
    return pleas_statistics(spec, models, plan, apply=net, data=data, **options)


def merged(setting, **options):
    spec, models, plan = setting
    return pleas(spec, models, plan, apply=net, **options)


def assert_same(a, b, rtol=1e-6):
    for name, leaf in a.models[0].items():
        np.testing.assert_allclose(b.models[0][name], leaf, rtol=rtol, atol=1e-7, err_msg=name)


@pytest.fixture(scope="module")
def wanted(setting):
    with jax.numpy_rank_promotion("allow"):
        return merged(setting, data=DATA)


def test_statistics_lead_to_the_network_that_the_data_lead_to(setting, wanted):
    statistics = collected(setting, DATA)
    found = merged(setting, statistics=statistics)
    assert_same(wanted, found)
    assert found.info.samples == statistics.samples == wanted.info.samples == 90
    np.testing.assert_array_equal(found.info.rows, wanted.info.rows)
    np.testing.assert_allclose(found.info.after, wanted.info.after, rtol=1e-6)


def test_batch_by_batch_gives_the_same_network(setting, wanted):
    assert_same(wanted, merged(setting, data=DATA, at_once=False))
    assert_same(wanted, merged(setting, data=[X]), rtol=1e-5)


@pytest.mark.parametrize("mode", ["parallel", "separate"])
def test_statistics_of_two_halves_add_up(setting, mode):
    whole = collected(setting, DATA, mode=mode)
    parts = collected(setting, DATA[:1], mode=mode) + collected(setting, DATA[1:], mode=mode)
    assert parts.samples == whole.samples == 90
    for name, grams in whole.grams.items():
        assert len(grams) == (1 if mode == "parallel" else 2)
        for a, b in zip(grams, parts.grams[name], strict=True):
            np.testing.assert_allclose(b.inputs, a.inputs, rtol=1e-12)
            np.testing.assert_allclose(b.cross, a.cross, rtol=1e-12, atol=1e-12)
            assert (b.rows, b.samples) == (a.rows, a.samples)
    assert_same(merged(setting, statistics=whole, mode=mode), merged(setting, statistics=parts, mode=mode))


@pytest.mark.parametrize("mode", ["parallel", "separate"])
def test_statistics_can_be_kept_in_a_file(setting, tmp_path, mode):
    statistics = collected(setting, DATA, mode=mode)
    statistics.save(tmp_path / "statistics.safetensors")
    found = Statistics.load(tmp_path / "statistics.safetensors")
    assert found.inputs == statistics.inputs
    assert found.samples == 90
    assert_same(merged(setting, statistics=statistics, mode=mode), merged(setting, statistics=found, mode=mode))


def test_owners_and_positions_go_into_statistics(setting):
    owners = [np.arange(len(x)) % 2 for x in DATA]
    statistics = collected(setting, DATA, targets="owner", owners=owners)
    assert_same(merged(setting, data=DATA, targets="owner", owners=owners), merged(setting, statistics=statistics))
    some = collected(setting, DATA, positions=2, key=jax.random.key(0))
    assert some.grams["k"][0].rows == 90 * 2
    assert statistics.grams["k"][0].rows == 90 * 4


def test_leaves_that_are_kept_have_no_statistics(setting):
    assert collected(setting, DATA[:1], keep=["w"]).grams.keys() == {"k"}


# what cannot be done


def test_what_follows_from_the_merged_network_needs_the_data(setting):
    statistics = collected(setting, DATA[:1])
    with pytest.raises(ValueError, match="mode 'sequential' fits each layer on what the merged network makes"):
        merged(setting, statistics=statistics, mode="sequential")
    with pytest.raises(ValueError, match="it needs all data at once"):
        merged(setting, data=DATA, mode="sequential", at_once=False)
    with pytest.raises(ValueError, match="either calibration `data` or the `statistics`"):
        merged(setting, data=DATA, statistics=statistics)
    with pytest.raises(ValueError, match="either calibration `data` or the `statistics`"):
        merged(setting)
    with pytest.raises(ValueError, match="'held_back' chooses by batches held back"):
        merged(setting, statistics=statistics, ridge="held_back")


def test_statistics_of_other_layers_do_not_fit(setting):
    some, every = collected(setting, DATA[:1], keep=["w"]), collected(setting, DATA[:1])
    with pytest.raises(ValueError, match="only one of the two statistics has the layer 'w'"):
        some + every
    with pytest.raises(ValueError, match="the statistics lack the layer 'w'; collect them with the same plan"):
        merged(setting, statistics=some)
    spec, models, _ = setting
    with pytest.raises(ValueError, match=r"layer 'k' are for weights \(19, 9\), but the plan makes \(19, 12\)"):
        pleas(spec, models, partial_plan(spec, ratios={"k:3": 1}), apply=net, statistics=every)
    with pytest.raises(ValueError, match="layer 'k' are not those of mode 'separate': there are 1 for 2 models"):
        merged(setting, statistics=every, mode="separate")


def test_files_that_hold_no_statistics_of_a_merge_are_named(setting, tmp_path):
    path = tmp_path / "grams.safetensors"
    (gram,) = collected(setting, DATA[:1]).grams["k"]
    save_grams(path, {"k": gram})
    with pytest.raises(ValueError, match=r"grams.safetensors' holds Grams, but not those of a whole merge"):
        Statistics.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"grams.safetensors' holds no Grams of permjax"):
        Statistics.load(path)


def test_statistics_are_plain_values(setting):
    statistics = collected(setting, DATA[:1])
    assert dataclasses.is_dataclass(statistics)
    assert statistics.inputs[0].shape == (30, 4, 4, 2)
