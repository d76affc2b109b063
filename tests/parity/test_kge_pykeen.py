"""Scores of common families, and filtered ranks on UMLS, against PyKEEN."""

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity

os.environ.setdefault("PYSTOW_HOME", tempfile.mkdtemp())  # importing PyKEEN makes folders
torch = pytest.importorskip("torch", reason="torch is not installed; parity needs the extra `parity`.")
pykeen = pytest.importorskip("pykeen", reason="pykeen is not installed; parity needs the extra `parity`.")

from pykeen.datasets import UMLS  # noqa: E402
from pykeen.evaluation import RankBasedEvaluator  # noqa: E402
from pykeen.models import Model  # noqa: E402
from pykeen.nn import modules  # noqa: E402

from permjax.kge.breakdown import by_direction  # noqa: E402
from permjax.kge.models import FAMILIES, score, score_all  # noqa: E402
from permjax.kge.rank import rank_metrics, ranks  # noqa: E402
from permjax.kge.triples import Graph  # noqa: E402

POLICIES = ("optimistic", "realistic", "pessimistic")


def joined(*parts):
    """The parts as one torch tensor: complex numbers from two parts."""
    arrays = [np.asarray(part) for part in parts]
    return torch.tensor(arrays[0] if len(arrays) == 1 else arrays[0] + 1j * arrays[1])


def negative_norm(scores):
    """-|x| from our -|x|^2."""
    return -jnp.sqrt(-scores)


@pytest.mark.parametrize(
    ("name", "interaction", "ours"),
    [
        ("transe", modules.TransEInteraction(p=2), negative_norm),
        ("transe", modules.TransEInteraction(p=2, power_norm=True), jnp.asarray),
        ("distmult", modules.DistMultInteraction(), jnp.asarray),
        ("complex", modules.ComplExInteraction(), jnp.asarray),
        ("rotate", modules.RotatEInteraction(), negative_norm),
    ],
)
def test_scores_are_those_of_pykeen(name, interaction, ours):
    family = FAMILIES[name](dimension=16)
    params = family.init(jax.random.key(0), 12, 5, 1.0)
    triples = np.random.default_rng(0).integers(0, (12, 5, 12), (40, 3)).astype(np.int32)
    entity = joined(*params["entity"].values())
    relation = joined(*family.relation(params["relation"]).values())
    expected = interaction(*(table[triples[:, i]] for i, table in enumerate((entity, relation, entity))))
    np.testing.assert_allclose(ours(score(family, params, jnp.asarray(triples))), expected, rtol=2e-5, atol=1e-5)
    found = score_all(family, params, *jnp.asarray(triples[:, :2].T))[np.arange(40), triples[:, 2]]
    np.testing.assert_allclose(ours(found), expected, rtol=2e-4, atol=1e-4)


class Table(Model):
    """A model of PyKEEN that reads its scores from an array `[E, 2R, E]`; heads are asked for by relation r + R."""

    def __init__(self, scores, factory):
        super().__init__(triples_factory=factory)
        self.scores, self.own_relations = torch.tensor(scores), factory.num_relations
        self.nothing = torch.nn.Parameter(torch.zeros(1))  # tells the device

    def score_t(self, hr_batch, **kwargs):  # noqa: ARG002
        return self.scores[hr_batch[:, 0], hr_batch[:, 1]]

    def score_h(self, rt_batch, **kwargs):  # noqa: ARG002
        return self.scores[rt_batch[:, 1], rt_batch[:, 0] + self.own_relations]

    def _get_entity_len(self, *, mode):  # noqa: ARG002
        return self.num_entities

    def score_hrt(self, hrt_batch, **kwargs):
        raise NotImplementedError

    score_r = collect_regularization_term = _reset_parameters_ = score_hrt


@pytest.fixture(scope="module")
def umls():
    """UMLS as PyKEEN brings it, and the same triples as a graph of ours."""
    theirs = UMLS()
    names = ((str(i) for i in range(n)) for n in (theirs.num_entities, theirs.num_relations))
    splits = (theirs.training, theirs.validation, theirs.testing)
    return theirs, Graph("UMLS", *map(tuple, names), *(split.mapped_triples.numpy() for split in splits))


@pytest.fixture(scope="module")
def tied_scores(umls):
    """Scores of a DistMult model, rounded so that there are many ties."""
    graph, family = umls[1], FAMILIES["distmult"](dimension=8)
    params = family.init(jax.random.key(1), graph.size, 2 * len(graph.relations), 1.0)
    heads, relations = map(jnp.ravel, jnp.indices((graph.size, 2 * len(graph.relations)), dtype=jnp.int32))
    scores = score_all(family, params, heads, relations).round(1)
    return np.asarray(scores).reshape(graph.size, -1, graph.size)


@pytest.mark.parametrize(("split", "filters"), [("test", ("training", "validation")), ("valid", ("training",))])
def test_filtered_ranks_on_umls_are_those_of_pykeen(umls, tied_scores, split, filters):
    theirs, graph = umls
    asked = {"test": theirs.testing, "valid": theirs.validation}[split].mapped_triples
    others = [getattr(theirs, name).mapped_triples for name in filters]
    evaluator = RankBasedEvaluator(clear_on_finalize=False)
    expected = evaluator.evaluate(
        Table(tied_scores, theirs.training), asked, batch_size=64, use_tqdm=False, additional_filter_triples=others
    )
    found = ranks(lambda h, r: jnp.asarray(tied_scores)[h, r], graph, split)
    assert len(np.unique(found.ties)) > 5
    for policy in POLICIES:
        for side, start in (("tail", 0), ("head", 1)):
            np.testing.assert_array_equal(
                getattr(found, policy)[start::2], np.concatenate(evaluator.ranks[side, policy])
            )
        for side, values in {"both": rank_metrics(found, policy), **by_direction(found, policy)}.items():
            keys = {"mrr": "inverse_harmonic_mean_rank", "mr": "arithmetic_mean_rank"}
            keys |= {f"hits_at_{k}": f"hits_at_{k}" for k in (1, 3, 10)}
            if policy == "realistic":
                keys |= {"amr": "adjusted_arithmetic_mean_rank", "amri": "adjusted_arithmetic_mean_rank_index"}
            reference = {ours: expected.get_metric(f"{side}.{policy}.{name}") for ours, name in keys.items()}
            assert {name: values[name] for name in keys} == pytest.approx(reference, rel=1e-6)
