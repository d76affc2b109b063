"""The shipped configurations reach their bars on real graphs, as means over their seeds."""

import os

import pytest

from permjax.config import load_config
from permjax.experiments.nfe import run
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.data,
    pytest.mark.skipif(not os.environ.get("PERMJAX_DATA"), reason="PERMJAX_DATA is not set; real graphs are not here."),
]

LEAST = {
    "nfe_umls": {"nfe_1_mrr": 0.90, "nfe_1_small_bound_mrr": 0.86},
    "nfe_nations": {"nfe_1_mrr": 0.80, "nfe_2_mrr": 0.82},
    "nfe_kinships": {"nfe_2_mrr": 0.74, "nfe_1_mrr": 0.68},
    "nfe_codex_s": {"mrr": 0.42},
}
MOST = {"nfe_kinships": {"transe_mrr": 0.15}}


@pytest.mark.parametrize("name", LEAST)
def test_a_config_reaches_its_bars_and_permuted_triples_are_at_chance(name, request, tmp_path):
    kinds = {kind: experiment.config for kind, experiment in experiments().items()}
    config = load_config(request.config.rootpath / "configs" / f"{name}.toml", [], kinds)
    found = run(config, tmp_path, Progress(visible=False)).metrics
    assert config.seeds >= 3
    assert {key: found[key] for key, bar in LEAST[name].items() if found[key] < bar} == {}
    assert {key: found[key] for key, bar in MOST.get(name, {}).items() if found[key] > bar} == {}
    assert found["mrr"] - found["mrr_pessimistic"] < 1e-3
    assert found["permuted_mrr"] == pytest.approx(found["chance_mrr"], rel=0.2)
