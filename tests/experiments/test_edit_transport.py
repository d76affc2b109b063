"""Runs on carried edits: a tiny one with all pairs, the ways between two models, and what the report says."""

from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
import pytest

from permjax.action import permute
from permjax.config import load_config, to_dict
from permjax.edit.collapse import Efficacy
from permjax.edit.delta import LowRank, apply_delta
from permjax.edit.facts import WorldConfig
from permjax.edit.places import mlp_place
from permjax.experiments import edit_transport
from permjax.experiments.collapse_base import BaseConfig, BaseSizeConfig
from permjax.experiments.collapse_editors import EditorsConfig
from permjax.experiments.edit_transport import EditTransportConfig
from permjax.experiments.edit_transport_report import KINDS, Arm, Pair, report
from permjax.experiments.edit_transport_ways import WAYS, Both, Matchings, Way, views_of, ways_between
from permjax.experiments.language_networks import SizeConfig, language_network
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments
from permjax.figures import Figure
from permjax.match.activations import ActivationMatching
from permjax.match.weights import WeightMatching
from permjax.permutation import random_permutations
from permjax.train import TrainConfig

TINY = BaseConfig(
    WorldConfig(short_names=12, full_names=2, dialects=1, characters=2000),
    size=BaseSizeConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=24),
    rows=640,
    train=TrainConfig(epochs=10, batch_size=32, optimizer="adamw", learning_rate=2e-2),
)


def _tiny():
    """Editors whose edits take in a tiny model; only its first layer is seen by later tokens."""
    known = EditorsConfig()
    value = replace(known.rome.value, kl=0.0, weight_decay=0.0, clamp=50.0)
    rome, c_rome = (replace(one, layer=0, value=value, ridge=1e-3) for one in (known.rome, known.c_rome))
    sizes: Any = {"edits": 3, "match_rows": 32, "covariance_rows": 32, "probe_rows": 32}
    further = replace(TINY.train, epochs=1, learning_rate=1e-3)
    return EditTransportConfig(base=TINY, further=further, settings=replace(known, rome=rome, c_rome=c_rome), **sizes)


def test_a_short_run_carries_edits_to_all_pairs_and_loses_none_where_units_were_only_permuted(tmp_path):
    with Progress(visible=False) as progress:
        found: Any = edit_transport.run(_tiny(), tmp_path, progress).metrics
    for name in ("rome", "c_rome"):
        for kind in ("bare", "prefixed", "free"):
            own = found[f"{name}_planted_own_efficacy_{kind}"]
            assert found[f"{name}_planted_matched_efficacy_{kind}"] == own
            assert {f"{name}_{pair}_{way}_efficacy_{kind}" for pair in KINDS for way in WAYS} <= {*found}
        assert found[f"{name}_planted_own_efficacy_bare"] > found["planted_untouched_efficacy_bare"]
        own = found[f"{name}_planted_own_energy"]
        assert found[f"{name}_planted_matched_energy"] == pytest.approx(own, rel=1e-3)
        assert found[f"{name}_planted_own_gain"] > 0.3
        gain = pytest.approx(found[f"{name}_planted_own_gain"], rel=1e-3)
        assert found[f"{name}_planted_matched_gain"] == gain != found[f"{name}_planted_random_gain"]
        assert found[f"{name}_planted_matched_reach"] == pytest.approx(1, rel=1e-3)
        assert found[f"{name}_planted_matched_cosine"] == pytest.approx(1, rel=1e-2)
        assert abs(found[f"{name}_planted_random_cosine"]) < 0.8
    assert found["planted_matched_found"] == 1
    assert found["planted_matched_distance"] == 0
    assert 0 < found["related_matched_distance"] < found["related_identity_distance"]
    assert "independent_matched_found" not in found
    assert len([*(tmp_path / "state").iterdir()]) == 3  # two bases, and one that was trained further


# the ways


def test_every_way_but_the_controls_carries_an_edit_back_to_units_that_were_permuted():
    net = language_network(SizeConfig(layers=2, width=8, heads=2, kv_heads=1, hidden=12), "llama", 30, 24, tied=True)
    a = jax.tree.map(lambda x: 3 * x, net.init(jax.random.key(0)))
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (48, 12), 0, 30))
    views = views_of(net, a, tokens)
    spec = views[0].spec
    planted = random_permutations(spec, jax.random.key(2))
    both = Both(*views, a, permute(spec, planted, a), tokens, tokens[:32], planted)
    found = ways_between(both, Matchings(WeightMatching(), ActivationMatching()), jax.random.key(3))
    place = mlp_place(net.config, 1)
    u, v = (np.random.default_rng(number).standard_normal((size, 1)) for number, size in enumerate((8, 12)))
    delta = {place.weight: LowRank(u, v, place.orientation)}
    run = jax.jit(net.apply)
    wanted = np.asarray(run(apply_delta(a, delta), tokens[:4]))
    moved = np.abs(wanted - run(a, tokens[:4])).max()
    off = {
        name: np.abs(run(apply_delta(both.b, way.carry(delta)), tokens[:4]) - wanted).max() / moved
        for name, way in found.items()
    }
    for name in ("matched", "activations", "rotated"):
        assert off[name] < 1e-3, name
        assert found[name].distance < 1e-4
        assert abs(found[name].barrier) < 1e-4
    assert min(off["identity"], off["random"], off["mlp"]) > 0.1  # the stream was permuted, too
    assert found["matched"].found == found["activations"].found == 1
    assert found["identity"].distance > 0.1


# the report, from numbers made up


def _pair(kind, carried):
    def arm(right, grip=1.0):
        efficacy = Efficacy(*(np.asarray([right, 0.0]) for _ in range(3)))
        return Arm(efficacy, np.ones(2), np.ones(2), np.ones(2), np.full(2, grip), np.full(2, right))

    arms = {"own": arm(1.0, 2.0), "native": arm(0.9), **{way: arm(carried) for way in WAYS}}
    ways = {way: Way(dict, 0.5, 1.5, 0.25 if kind == "planted" else float("nan")) for way in WAYS}
    return Pair(kind, 0, {"rome": arms}, Efficacy(*(np.zeros(2) for _ in range(3))), ways)


@pytest.mark.fast
@pytest.mark.parametrize("carried", [0.0, 1.0])
def test_the_report_tells_what_is_left_whatever_it_is(carried):
    config = EditTransportConfig(editors=("rome",), edits=1)
    pairs = [_pair(kind, carried) for kind in KINDS]
    outcome = report(config, pairs)
    assert outcome.metrics["rome_related_matched_efficacy_bare"] == carried / 2
    assert outcome.metrics["rome_related_matched_reach"] == 0.5
    assert outcome.metrics["planted_matched_found"] == 0.25
    assert f"{50 * carried:.0f} % carried by matched weights" in outcome.summary
    assert "25.0 % of all units" in outcome.summary
    hard, control = outcome.tables[0].rows[2][2:4]
    assert (hard, control) == (100 * carried, 0)
    assert [curve.label for curve in cast(Figure, outcome.figures[0]).curves] == [*KINDS]


@pytest.mark.fast
def test_the_shipped_config_on_carried_edits_has_a_header_and_round_trips(request):
    path = request.config.rootpath / "configs" / "edit_transport.toml"
    kinds = {kind: one.config for kind, one in experiments().items()}
    config = load_config(path, [], kinds)
    assert load_config(path, [f"seed={config.seed}"], kinds) == config
    assert to_dict(config)["experiment"] == "edit_transport"
    head = path.read_text(encoding="utf-8").split("experiment =")[0]
    assert all(f"# {word}:" in head for word in ("Paper", "Claim", "Expected", "Seen", "Data", "Time", "Command"))
    assert "permjax run configs/edit_transport.toml" in head
    assert len(head.splitlines()) <= 12
    assert max(map(len, head.splitlines())) <= 120


@pytest.mark.fast
def test_configs_on_carried_edits_that_cannot_be_run_are_refused():
    with pytest.raises(ValueError, match="'memit' makes no change of rank one"):
        EditTransportConfig(editors=("memit",))
    with pytest.raises(ValueError, match="at least 1"):
        EditTransportConfig(match_rows=0)
