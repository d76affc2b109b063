"""A run on the reversal curse: its configurations, a tiny run, resume, and what the report makes of numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from permjax.config import load_config
from permjax.experiments.data_root import DataRoot
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
    return report(
        TINY, names(3, 3, pool=9), {name: [one] for name, one in trials.items()}, Speed(0.01, 700.0, 1.0), 9.5
    )


def test_a_tiny_run_measures_all_and_goes_on_where_it_stopped(tmp_path):
    outcome = start(TINY, tmp_path)
    for name in TINY.methods:
        for measure in ("forward", "reverse_seen", "reverse_heldout", "control", "unknown_wrong"):
            assert 0 <= outcome.metrics[f"{name}_{measure}"] <= 100
        assert outcome.metrics[f"{name}_text_ppl"] > 1
    assert outcome.metrics["ntp_share_original"] == 1
    assert outcome.metrics["segmenter_lossless"] == 1
    assert outcome.metrics["tokens_per_second"] > 0
    assert 1 <= outcome.metrics["untrained_antecedent_rank"] <= 20
    again = start(TINY, tmp_path)  # all state is there
    same = {key for key in outcome.metrics if key.startswith(("ntp", "spt"))}
    assert {key: again.metrics[key] for key in same} == {key: outcome.metrics[key] for key in same}


def write_descriptions(root):
    """A corpus like that of Berglund et al., of a few people."""
    folder, cuts = root / "reversal" / "descriptions", root / "reversal" / "segmented"
    folder.mkdir(parents=True)
    cuts.mkdir()
    people = [f"{first} {last}" for first in ("Ann", "Bob", "Eve", "Tom") for last in ("Lee", "Ray", "Fox", "Orr")]
    deeds = [f"the {job} of {thing}" for job in ("painter", "pilot", "miller", "singer") for thing in "abcd"]
    lines = []
    for name, numbers in (("both", range(4)), ("d2p", range(4, 10)), ("p2d", range(10, 16))):
        rows = [(f"{people[n]} is known as", f" {deeds[n]}.") for n in numbers]
        rows += [(f"Known as {deeds[n]} is", f" {people[n]}.") for n in numbers]
        lines += ["[SEP]".join(row) for row in rows]
        for kind in ("train", "test"):
            write_records(folder / f"{name}_prompts_{kind}.jsonl", rows)
    for name in ("d2p", "p2d"):
        write_records(folder / f"{name}_reverse_prompts_test.jsonl", [("Known as the pilot of a is", " Bob Lee.")])
    (cuts / "descriptions_train.txt").write_text("\n".join(lines))


def write_records(path, rows):
    path.write_text("".join(json.dumps({"prompt": prompt, "completion": end}) + "\n" for prompt, end in rows))


def test_descriptions_are_asked_both_ways_with_the_units_of_rules_and_of_the_authors(tmp_path):
    write_descriptions(tmp_path)
    config = replace(TINY, corpus="descriptions", options={}, data=DataRoot(str(tmp_path)))
    outcome = start(replace(config, methods=("spt", "spt_assistant")), tmp_path)
    for name in ("spt", "spt_assistant"):
        for kind in ("forward_names", "forward_descriptions", "reverse_names", "reverse_descriptions"):
            assert 0 <= outcome.metrics[f"{name}_{kind}"] <= 100
            assert (f"{name}_bleu_{kind}" in outcome.metrics) == kind.endswith("descriptions")
        assert outcome.metrics[f"{name}_reverse_names_best"] >= outcome.metrics[f"{name}_reverse_names"]
    assert outcome.headline[:2] == ("spt_reverse_names", "spt_assistant_reverse_names")
    assert "the first three words" in " ".join(table.caption for table in outcome.tables)


def test_a_base_model_a_small_assistant_and_shares_are_trained_and_reported(tmp_path):
    short = ReversalTraining(steps=2, batch_size=8, warmup_steps=1)
    config = replace(TINY, methods=("spt_lm",), shares=(0.5,), pretraining=short)
    outcome = start(replace(config, assistant=replace(short, batch_size=4)), tmp_path)
    assert 0 <= outcome.metrics["segmenter_lm_boundary_f1"] <= 1
    assert "tell none of the facts" in outcome.summary
    (table,) = (table for table in outcome.tables if table.title.startswith("By the share"))
    assert [row[1] for row in table.rows] == ["50 %"]
    assert (tmp_path / "state" / "spt_lm-0-0.5.json").is_file()  # no other share writes there


def test_a_share_keeps_the_number_of_facts():
    corpus = replace(TINY, shares=(0.25,)).load(0, 0.25)
    seen, heldout = (
        sum(prompt.kind == kind for prompt in corpus.prompts) for kind in ("reverse_seen", "reverse_heldout")
    )
    assert (seen, heldout) == (3, 9)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["names", "chain", "qa", "pretrained", "descriptions", "celebrities"])
def test_the_shipped_configurations_are_some_and_name_their_command(name):
    known = {kind: experiment.config for kind, experiment in experiments().items()}
    path = find_config(f"spt_{name}")
    assert isinstance(load_config(path, [], known), SptConfig)
    assert f"permjax run configs/spt_{name}.toml" in path.read_text(encoding="utf-8")


@pytest.mark.fast
def test_the_fast_run_has_three_methods_and_fewer_steps():
    known = {kind: experiment.config for kind, experiment in experiments().items()}
    path = find_config("spt_names")
    config, fast = load_config(path, [], known), load_config(path, ["fast=true"], known)
    assert (fast.chosen, fast.trained.steps) == (FAST_METHODS, 1000)
    assert config.trained.steps == 2000


@pytest.mark.fast
def test_the_report_says_what_the_numbers_say():
    outcome = reported(ntp=trial(99.0, 0.5, rank=9.0), spt=trial(99.0, 97.0, best=98.0, unknown_wrong=90.0))
    assert "next token: forward 99.0 %, reverse held out 0.5 %, the full curse." in outcome.summary
    assert "SPT: forward 99.0 %, reverse held out 97.0 %, no gap." in outcome.summary
    assert (
        "9.0 of 20 by next-token training and 5.0 by SPT (9.5 before training, 10.5 by chance): the direction that"
        in outcome.summary
    )
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
    for corpus, method in (("qa", "identity_bridge"), ("names", "spt_assistant")):
        with pytest.raises(ValueError, match=f"{method} is not possible with the corpus '{corpus}'"):
            replace(TINY, corpus=corpus, methods=(method,))
    with pytest.raises(ValueError, match="shares"):
        replace(TINY, shares=(1.5,))
    with pytest.raises(ValueError, match=r"no option 'bot'.*both"):
        replace(TINY, options={"bot": 3}).load(0)
