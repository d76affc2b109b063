"""The price of permuted units on ordinary text: a tiny run, resume, and what is refused."""

from dataclasses import replace

import pytest

from permjax.config import load_config
from permjax.experiments.progress import Progress
from permjax.experiments.registry import experiments
from permjax.experiments.runs import find_config
from permjax.experiments.spt_config import GptConfig
from permjax.experiments.spt_text import SourceConfig, SptTextConfig, run
from permjax.reversal.training import ReversalTraining

TINY = SptTextConfig(
    texts=(SourceConfig(characters=2000),),
    methods=("ntp", "spt"),
    words=40,
    model=GptConfig(16, 1, 2),
    training=ReversalTraining(steps=4, batch_size=8, warmup_steps=1, every=2),
)


def start(config, folder):
    with Progress(visible=False) as progress:
        return run(config, folder, progress)


def test_a_tiny_run_tells_perplexities_and_goes_on_where_it_stopped(tmp_path):
    outcome = start(TINY, tmp_path)
    assert {"ntp_text_ppl", "spt_text_ppl", "spt_text_ppl_invented"} <= {*outcome.metrics}
    assert all(1 < value < 200 for value in outcome.metrics.values())
    assert [len(curve.x) for curve in outcome.figures[0].curves] == [2, 2]
    assert start(TINY, tmp_path).metrics == outcome.metrics


@pytest.mark.fast
def test_the_configuration_of_texts_is_one_and_names_its_command():
    path = find_config("spt_text_cost")
    known = {kind: experiment.config for kind, experiment in experiments().items()}
    assert isinstance(load_config(path, [], known), SptTextConfig)
    assert "permjax run configs/spt_text_cost.toml" in path.read_text(encoding="utf-8")


@pytest.mark.fast
def test_methods_that_hide_tokens_and_two_texts_of_one_key_are_refused():
    with pytest.raises(ValueError, match="'mlm_u'"):
        replace(TINY, methods=("mlm_u",))
    with pytest.raises(ValueError, match="different keys"):
        replace(TINY, texts=(SourceConfig(), SourceConfig()))
