"""A run on the reversal curse: its configurations, a tiny run, resume, and what the report makes of numbers."""

from dataclasses import replace

import numpy as np
import pytest

from permjax.config import load_config
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments
from permjax.experiments.runs import find_config
from permjax.experiments.spt import run
from permjax.experiments.spt_config import FAST_METHODS, GptConfig, SptConfig
from permjax.experiments.spt_report import Speed, Trial, report
from permjax.reversal.corpus import names
from permjax.reversal.training import ReversalTraining

TINY = SptConfig(
    options={"both": 6, "one_way": 6, "pool": 9, "tellings": 1},
    methods=("ntp", "spt"),
    model=GptConfig(16, 1, 2),
    training=ReversalTraining(steps=4, batch_size=8, warmup_steps=1, every=2),
)


def start(config, folder):
    with Progress(visible=False) as progress:
        return run(config, folder, progress)


def trial(forward, heldout, best=None, rank=5.0, **more):
    scores = {"forward": forward, "reverse_seen": 100.0, "reverse_heldout": heldout, "name_above_random": 50.0}
    scores |= {"antecedent_rank": rank, "antecedent_first": 10.0, "text_ppl": 3.0} | more
    curve = {1: {"reverse_heldout": heldout if best is None else best}, 2: {"reverse_heldout": heldout}}
    return Trial(scores, curve, np.array([10, 20, 30]), 700.0, [(1, 2.0), (1, 1.0)])


def reported(**trials):
    return report(TINY, names(3, 3, pool=9), {name: [one] for name, one in trials.items()}, Speed(0.01, 700.0, 1.0))


def test_a_tiny_run_measures_all_and_goes_on_where_it_stopped(tmp_path):
    outcome = start(TINY, tmp_path)
    for name in TINY.methods:
        for measure in ("forward", "reverse_seen", "reverse_heldout", "control", "unknown_wrong"):
            assert 0 <= outcome.metrics[f"{name}_{measure}"] <= 100
        assert outcome.metrics[f"{name}_text_ppl"] > 1
    assert outcome.metrics["ntp_share_original"] == 1
    assert outcome.metrics["segmenter_lossless"] == 1
    assert outcome.metrics["tokens_per_second"] > 0
    again = start(TINY, tmp_path)  # all state is there
    same = {key for key in outcome.metrics if key.startswith(("ntp", "spt"))}
    assert {key: again.metrics[key] for key in same} == {key: outcome.metrics[key] for key in same}


@pytest.mark.fast
def test_the_shipped_configuration_is_one_and_names_its_command():
    known = {kind: experiment.config for kind, experiment in experiments().items()}
    path = find_config("spt_names")
    config = load_config(path, [], known)
    assert isinstance(config, SptConfig)
    assert "permjax run configs/spt_names.toml" in path.read_text(encoding="utf-8")
    fast = load_config(path, ["fast=true"], known)
    assert (fast.chosen, fast.trained.steps) == (FAST_METHODS, 1000)
    assert config.trained.steps == 2000


@pytest.mark.fast
def test_the_report_says_what_the_numbers_say():
    outcome = reported(ntp=trial(99.0, 0.5, rank=9.0), spt=trial(99.0, 97.0, best=98.0, unknown_wrong=90.0))
    assert "next token: forward 99.0 %, reverse held out 0.5 %, the full curse." in outcome.summary
    assert "SPT, true units: forward 99.0 %, reverse held out 97.0 %, no gap." in outcome.summary
    assert "9.0 of 20 by next-token training and 5.0 by SPT: the direction that the paper gives" in outcome.summary
    assert "trained from scratch" in outcome.summary
    assert outcome.metrics["spt_reverse_heldout_best"] == 98
    assert outcome.metrics["permute_share_of_step"] == 0.01
    assert outcome.metrics["spt_share_random"] == 0.5
    other = reported(ntp=trial(99.0, 0.5, rank=4.0), spt=trial(99.0, 50.0, chain=20.0, chain_wrong=75.0))
    assert "not the direction that the paper gives" in other.summary
    assert "the right one in 20.0 % and the associated one in 75.0 %" in other.summary


@pytest.mark.fast
def test_what_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match=r"'spt_rule'.*spt_rules"):
        replace(TINY, methods=("spt_rule",))
    with pytest.raises(ValueError, match="each once"):
        replace(TINY, methods=("spt", "spt"))
    with pytest.raises(ValueError, match="identity_bridge needs"):
        replace(TINY, corpus="qa", methods=("identity_bridge",))
