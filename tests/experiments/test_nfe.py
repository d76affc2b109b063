"""The experiment on knowledge graphs: what it measures and controls, on graphs and models small enough for a test."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from permjax.config import load_config, to_toml
from permjax.experiments.nfe import permuted, run
from permjax.experiments.nfe_config import GraphConfig, ModelConfig, NfeConfig
from permjax.experiments.nfe_rows import chance, title
from permjax.experiments.registry import experiments
from permjax.kge.flows import Nfe1, Nfe2
from permjax.kge.graph import family_graph, save_graph
from permjax.kge.model_files import load_kge
from permjax.kge.rank import rank_metrics, rank_model
from permjax.kge.train import DivergedError, KgeTraining

PEOPLE = {"couples": 4, "generations": 3}
SMALL = NfeConfig(
    graphs=(GraphConfig(options=PEOPLE),),
    models=(ModelConfig(), ModelConfig("distmult", training={"gamma": 1.0, "init_bound": 0.1})),
    dimension=8,
    training=KgeTraining(epochs=4, batch_size=64, learning_rate=0.05, valid_every=2),
    compared=(("nfe_1", "distmult"),),
    seeds=2,
)
MEASURES = ("mrr", "hits_at_1", "hits_at_3", "hits_at_10", "mr")


class Silent:
    """A progress bar that shows nothing, and can interrupt."""

    def __init__(self, after=None):
        self.left = after

    def start(self, *_):
        pass

    def step(self, *_, **__):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    def done(self):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def outcome(folder):
    return run(SMALL, folder, Silent())


# the run


def test_every_promised_number_is_there_and_finite(outcome):
    speeds = ("triples_per_second", "queries_per_second", "seconds_train", "valid_mrr")
    every = [*MEASURES, *(f"{name}_pessimistic" for name in MEASURES)]
    keys = {prefix + name for prefix in ("", "nfe_1_", "distmult_") for name in (*every, *speeds)}
    keys |= {
        "mrr_std",
        "distmult_mr_pessimistic_std",
        "head_mrr",
        "tail_mrr",
        "mrr_n_n",
        "permuted_mrr",
        "chance_mrr",
        "amr",
    }
    keys |= {"nfe_1_over_distmult", "nfe_1_over_distmult_low", "nfe_1_over_distmult_high"}
    keys |= {"rules_precision", "rules_recall", "test_triples_answered_by_train"}
    assert keys <= set(outcome.metrics)
    assert all(np.isfinite(outcome.metrics[key]) for key in keys)


def test_numbers_without_a_prefix_are_those_of_the_first_model(outcome):
    found = outcome.metrics
    assert all(found[name] == found[f"nfe_1_{name}"] for name in MEASURES)
    assert found["nfe_1_over_distmult"] == pytest.approx(found["nfe_1_mrr"] - found["distmult_mrr"])
    assert found["mrr_pessimistic"] <= found["mrr"]
    assert (found["head_mrr"] + found["tail_mrr"]) / 2 == pytest.approx(found["mrr"])


def test_the_first_model_learns_and_permuted_triples_are_at_chance(outcome):
    found = outcome.metrics
    assert found["mrr"] > 1.5 * found["chance_mrr"]
    assert found["permuted_mrr"] == pytest.approx(found["chance_mrr"], rel=0.15)
    assert found["permuted_amr"] == pytest.approx(1, abs=0.05)


def test_the_saved_model_is_that_of_the_best_seed_and_ranks_as_reported(outcome, folder):
    model = load_kge(folder / "model")
    assert model.family == Nfe1(dimension=8)
    assert model.about["seed"] in (0, 1)
    assert model.about["training"]["epochs"] == 4
    own, valid = (
        rank_metrics(rank_model(model.family, model.params, model.graph, split)) for split in ("test", "valid")
    )
    assert valid["mrr"] == pytest.approx(model.about["valid_mrr"])
    assert model.about["valid_mrr"] >= outcome.metrics["valid_mrr"] - 1e-6
    half = outcome.metrics["mrr_std"] / np.sqrt(2)  # of two seeds
    assert abs(own["mrr"] - outcome.metrics["mrr"]) == pytest.approx(half, rel=1e-3, abs=1e-6)


def test_tables_and_figures_are_complete_and_the_words_follow_the_numbers(outcome):
    assert {figure.name for figure in outcome.figures} == {
        "differences",
        "learning_family",
        "relations",
        "maps",
        "agreement",
    }
    titles = [table.title for table in outcome.tables]
    assert titles[:3] == ["Test triples", "Differences", "By direction and kind of relation"]
    assert {"Speed", "What train gives away", "Known rules that are found"} <= {*titles}
    assert f"NFE-1 on family: MRR {outcome.metrics['mrr']:.3f}" in outcome.summary
    assert f"NFE-1 minus DistMult on family: {outcome.metrics['nfe_1_over_distmult']:+.4f}" in outcome.summary
    assert all(key in outcome.metrics for key in outcome.headline)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(outcome, folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, tmp_path, Silent(after=4 + 2 + 3))  # in the last epochs of the second model
    assert (tmp_path / "state" / "family-distmult").is_dir()
    again = run(SMALL, tmp_path, Silent()).metrics
    timed = ("per_second", "seconds_train")
    assert {key for key in again if again[key] != outcome.metrics[key] and not key.endswith(timed)} == set()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()


def test_several_graphs_have_their_own_numbers(tmp_path):
    graph = family_graph(seed=1, **PEOPLE)
    save_graph(graph, tmp_path / "My-Tree.npz")
    own = GraphConfig("folder", {"path": str(tmp_path / "My-Tree.npz")}, {"epochs": 1})
    config = replace(SMALL, graphs=(*SMALL.graphs, own), models=SMALL.models[:1], compared=(), seeds=1)
    config = replace(config, training=replace(config.training, valid_every=0))
    outcome = run(config, tmp_path / "out", Silent())
    found = outcome.metrics
    assert found["mrr"] == found["family_nfe_1_mrr"] != found["my_tree_nfe_1_mrr"]
    assert "mrr_std" not in found
    assert not any(figure.name.startswith("learning") for figure in outcome.figures)


def test_a_loss_that_is_no_number_ends_the_run_in_a_sentence(tmp_path):
    config = replace(SMALL, training=replace(SMALL.training, learning_rate=1e30), seeds=1)
    with pytest.raises(DivergedError, match="no finite number"):
        run(config, tmp_path, Silent())


# controls


@pytest.mark.fast
def test_permuted_triples_keep_the_structure_but_are_no_facts():
    graph = family_graph(**PEOPLE)
    found = permuted(graph, np.random.default_rng(0), least=5 * len(graph.test))
    facts = {*map(tuple, graph.train.tolist()), *map(tuple, graph.valid.tolist())}
    assert not facts & {*map(tuple, found.test.tolist())}
    assert 4 * len(graph.test) < len(found.test) <= 5 * len(graph.test)
    assert (found.test[:, 0] != found.test[:, 2]).all()
    shares = (np.bincount(one.test[:, 1], minlength=13) / len(one.test) for one in (graph, found))
    assert np.abs(np.subtract(*shares)).max() < 0.1
    np.testing.assert_array_equal(found.train, graph.train)


@pytest.mark.fast
def test_chance_is_the_mean_of_reciprocal_ranks_over_all_ranks():
    assert chance([1]) == 1
    assert chance([4, 2]) == pytest.approx(((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4 + (1 + 1 / 2) / 2) / 2)


def test_an_untrained_model_is_at_chance_on_permuted_triples():
    graph = permuted(family_graph(**PEOPLE), np.random.default_rng(0), least=5000)
    family = Nfe2(dimension=8)
    params = family.init(jax.random.key(0), graph.size, 2 * len(graph.relations), 0.3)
    found = rank_model(family, params, graph, filtered=("train", "valid"))
    assert rank_metrics(found)["mrr"] == pytest.approx(chance(found.candidates), rel=0.15)


# settings


@pytest.mark.fast
def test_settings_of_models_go_before_those_of_graphs_and_these_before_all_others():
    graphs = (GraphConfig(), GraphConfig("umls", training={"epochs": 7, "gamma": 3}))
    models = (ModelConfig(), ModelConfig("exact", "nfe_2", {"mode": "exact", "dimension": 5}, {"gamma": 9.0}))
    config = replace(SMALL, graphs=graphs, models=models, compared=())
    found = {(one.graph, one.model): one for one in config.settings()}
    assert [*found] == [(graph, model) for graph in ("family", "umls") for model in ("nfe_1", "exact")]
    assert [one.training.gamma for one in found.values()] == [4.0, 9.0, 3.0, 9.0]
    assert [one.training.epochs for one in found.values()] == [4, 4, 7, 7]
    assert found["umls", "exact"].family == Nfe2(dimension=5, mode="exact")
    assert found["umls", "nfe_1"].family == Nfe1(dimension=8)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": ()}, "models must be one or more"),
        ({"models": (ModelConfig(), ModelConfig(family="nfe_2"))}, "models must be one or more of different names"),
        ({"models": (ModelConfig("nfe_5"),)}, "no family 'nfe_5'"),
        ({"models": (ModelConfig("distmult", options={"mode": "exact"}),)}, "'distmult' has no setting 'mode'"),
        ({"models": (ModelConfig(training={"gama": 1.0}),)}, "'nfe_1' on 'family' has the unknown key 'gama'.*'gamma'"),
        ({"models": (ModelConfig(training={"epochs": "many"}),)}, "'epochs' must be int, not 'many'"),
        ({"graphs": (GraphConfig("umsl"),)}, "no graph 'umsl' \\(nearest: 'umls'\\)"),
        ({"graphs": (GraphConfig(), GraphConfig())}, "graphs must be one or more of different names"),
        ({"compared": (("nfe_1", "distmul"),)}, "compared names 'distmul' \\(nearest: 'distmult'\\)"),
        ({"seeds": 0}, "seeds must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **{"compared": ()} | changes)


@pytest.mark.fast
def test_models_have_titles():
    found = map(title, ("nfe_1", "nfe_1_mu", "nfe_2_exact", "my_model"))
    assert [*found] == ["NFE-1", "NFE-1, means only", "NFE-2, exact", "my model"]


@pytest.mark.fast
def test_the_shipped_configs_have_a_header_and_round_trip(tmp_path, request):
    kinds = {kind: experiment.config for kind, experiment in experiments().items()}
    paths = sorted((request.config.rootpath / "configs").glob("nfe_*.toml"))
    read = {path.stem: load_config(path, [], kinds) for path in paths}
    own = {name: config for name, config in read.items() if isinstance(config, NfeConfig)}
    small = ("family", "umls", "nations", "kinships", "codex_s", "ablation")
    assert {f"nfe_{name}" for name in (*small, "wn18rr", "fb15k237", "wn18rr_full", "fb15k237_full")} <= {*own}
    for name, config in own.items():
        head = (request.config.rootpath / "configs" / f"{name}.toml").read_text().split("experiment =")[0]
        assert all(f"# {word}:" in head for word in ("Paper", "Claim", "Expected", "Seen", "Data", "Time", "Command"))
        assert f"permjax run configs/{name}.toml" in head
        (tmp_path / "again.toml").write_text(to_toml(config))
        assert load_config(tmp_path / "again.toml", [], kinds) == config
