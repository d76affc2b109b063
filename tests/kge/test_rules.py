import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.graph import Graph, family_graph
from permjax.kge.models import FAMILIES
from permjax.kge.rule_elements import as_row, involution
from permjax.kge.rules import measure_rules, recovery
from permjax.kge.train import KgeTraining, train_kge
from permjax.kge.triples import Rule

D, STARTS = 8, 12
NAMES = ("first", "second", "both", "back", "mirror")
PLANTED = {
    "symmetry": [("mirror",)],
    "inverse": [("first", "back")],
    "composition": [("first", "second", "both"), ("back", "both", "second")],
    "antisymmetry": [("first",), ("second",), ("both",), ("back",)],
}


def planted(family):
    """Relations made by the algebra, and the entities that they move some starting points to; no reciprocal rows."""
    params = family.init(jax.random.key(0), STARTS, 3, bound=1.0)
    first, second, other = ({k: v[r] for k, v in family.relation(params["relation"]).items()} for r in range(3))
    both, back, mirror = family.compose(second, first), family.inverse(first), involution(family, other)
    points = family.entity(params["entity"])
    if family.entity_parts == ("r", "i", "j", "k"):  # an inner product is greatest for the same one of equal length
        size = jnp.sqrt(sum(part**2 for part in points.values()))
        points = {name: part / size for name, part in points.items()}

    def move(element):
        wide = {k: jnp.broadcast_to(v, (STARTS, *v.shape)) for k, v in element.items()}
        return family.act(wide, points)

    tables = [points, move(first), move(both), move(mirror)]
    relations = [as_row(family, element) for element in (first, second, both, back, mirror)]
    x = np.arange(STARTS)
    y, z, w = x + STARTS, x + 2 * STARTS, x + 3 * STARTS
    sides = [(x, 0, y), (y, 1, z), (x, 2, z), (y, 3, x), (x, 4, w), (w, 4, x)]
    triples = np.array([(h, r, t) for heads, r, tails in sides for h, t in zip(heads, tails, strict=True)])
    graph = Graph("planted", tuple(map(str, range(4 * STARTS))), NAMES, triples, triples, triples)
    table = {part: jnp.concatenate([some[part] for some in tables]) for part in points}
    return graph, {"entity": table, "relation": {k: jnp.stack([row[k] for row in relations]) for k in relations[0]}}


@pytest.mark.parametrize("name", ["nfe_1", "nfe_2", "rotate", "quate"])
def test_constructed_rules_are_found_exactly(name):
    family = FAMILIES[name](dimension=D)
    graph, params = planted(family)
    report = measure_rules(family, params, graph, kinds=PLANTED)
    known = [Rule(kind, relations) for kind, some in PLANTED.items() for relations in some]
    for row in recovery(report.found(), known):
        assert (row.precision, row.recall) == (1, 1), row
    exact = [row for row in report.found() if row.rule.kind != "antisymmetry"]
    np.testing.assert_allclose([row.strength for row in exact], 1, atol=1e-4)


# a trained model


@pytest.fixture(scope="module")
def family():
    return family_graph()


@pytest.fixture(scope="module")
def trained(family):
    model = FAMILIES["nfe_1"](dimension=64)
    result = train_kge(model, family, KgeTraining(valid_every=0))
    return model, jax.tree.map(lambda x: x[0], result.params)


@pytest.fixture(scope="module")
def report(trained, family):
    return measure_rules(*trained, family)


def test_the_rules_of_the_family_tree_are_recovered_from_a_trained_model(report, family):
    found = {row.kind: row for row in recovery(report.found(), family.rules)}
    assert (found["symmetry"].precision, found["symmetry"].recall) == (1, 1)
    assert found["inverse"].recall == 1
    assert found["inverse"].precision >= 0.6
    assert found["hierarchy"].recall >= 0.8
    assert found["hierarchy"].precision >= 0.8
    assert found["exclusion"].precision >= 0.95
    assert found["exclusion"].recall >= 0.7
    assert found["composition"].precision >= 0.75
    assert found["composition"].recall >= 0.75
    right, known = (sum(getattr(row, part) for row in found.values()) for part in ("right", "known"))
    assert right / known >= 0.75
    assert right / sum(row.found for row in found.values()) >= 0.8


def test_the_model_alone_knows_more_than_chance(report, family):
    """Of the compositions that train has at all, the model finds true ones, without the confidence of the graph."""
    rows = [row for row in report.rules if row.rule.kind == "composition"]
    holding = np.array([row.rule in family.rules for row in rows])
    strength = np.array([row.strength for row in rows])
    assert (strength[holding][:, None] > strength[~holding][None]).mean() > 0.85
    shuffled = np.random.default_rng(0).permutation(strength)
    assert (shuffled[holding][:, None] > shuffled[~holding][None]).mean() < 0.65


def test_the_report_has_the_maps_of_all_relations_and_their_reverses(report, family):
    count = len(family.relations)
    assert report.names[:count] == family.relations
    assert report.names[count] == "parent_of^-1"
    assert report.agreement.shape == (2 * count, 2 * count)
    np.testing.assert_allclose(report.agreement, report.agreement.T, atol=1e-5)
    np.testing.assert_allclose(np.diag(report.agreement), 1, atol=1e-4)
    assert {part: values.shape for part, values in report.elements.items()} == {
        "scale": (2 * count, 64),
        "shift": (2 * count, 64),
    }


def test_the_report_is_in_order_and_says_what_train_says(report, family):
    rows = [row for row in report.rules if row.rule.kind == "composition"]
    assert [row.strength for row in rows] == sorted((row.strength for row in rows), reverse=True)
    row = next(row for row in report.rules if row.rule == Rule("symmetry", ("married_to",)))
    pairs = {(h, t) for h, r, t in family.train.tolist() if r == family.relation("married_to")}
    both = len({(t, h) for h, t in pairs} & pairs)
    assert (row.support, row.confidence) == (both, both / len(pairs))
    assert all(np.isnan(row.agreement) == (row.rule.kind == "intersection") for row in report.rules)


def test_a_model_of_another_graph_is_refused(trained, family):
    model, params = trained
    other = family_graph(couples=5)
    with pytest.raises(ValueError, match=r"the model has 196 entities, but family has \d+"):
        measure_rules(model, params, other)
    fewer = {**params, "relation": {part: values[:20] for part, values in params["relation"].items()}}
    with pytest.raises(ValueError, match="has 20 rows, but 13 relations have 13 rows, or 26"):
        measure_rules(model, fewer, family)
