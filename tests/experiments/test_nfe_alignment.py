"""Averaging aligned tables, end to end on a small generated graph."""

import numpy as np
import pytest

from permjax.experiments.nfe_alignment import NfeAlignmentConfig, run
from permjax.experiments.nfe_config import ModelConfig
from permjax.experiments.progress import Progress
from permjax.kge.train import KgeTraining


def test_aligned_averages_beat_unaligned_ones(tmp_path):
    training = KgeTraining(epochs=12, batch_size=512, valid_every=12, learning_rate=0.02, gamma=4.0)
    config = NfeAlignmentConfig(dimension=32, training=training, trials=1)
    with Progress(visible=False) as progress:
        outcome = run(config, tmp_path, progress)
    metrics = outcome.metrics
    assert metrics["aligned_mrr_mean"] > metrics["unaligned_mrr_mean"]
    assert metrics["planted_recovered"] == 1
    assert metrics["planted_error"] < 1e-5
    line = outcome.figures[0].curves[0].mean
    np.testing.assert_allclose((line[0] + line[-1]) / 2, metrics["parents_mrr_mean"])


@pytest.mark.fast
def test_an_alignment_without_pairs_or_of_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="trials must be at least 1"):
        NfeAlignmentConfig(trials=0)
    with pytest.raises(ValueError, match="nfe_11"):
        NfeAlignmentConfig(model=ModelConfig("nfe_11"))
