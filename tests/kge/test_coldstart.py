import jax
import jax.numpy as jnp
import numpy as np
import pytest

from permjax.kge.coldstart import cold_start, with_entity
from permjax.kge.graph import Graph, family_graph
from permjax.kge.models import FAMILIES, moved, rows, score, score_all
from permjax.kge.train import KgeTraining, train_kge
from permjax.kge.triples import both_ways

D, E, R = 5, 9, 3
OPTIONS = {"nfe_2 exact": {"mode": "exact"}, "nfe_k": {"pieces": 3}}


def make(name):
    return FAMILIES[name.split()[0]](dimension=D, **OPTIONS.get(name, {}))


def draw(family, relations=R, seed=0):
    params = family.init(jax.random.key(seed), E, relations, bound=1.0)
    return jax.tree.map(lambda x: x.astype(jnp.float64), params)


def triples_of(new):
    """Three with the entity as head, three with it as tail."""
    return np.array([(new, r, 1 + r) for r in range(R)] + [(4 + r, r, new) for r in range(R)])


def total(family, params, row, triples):
    """The sum of the scores of triples whose new entity has this row."""
    return score(family, with_entity(params, row), jnp.asarray(triples)).sum()


@pytest.mark.parametrize("name", ["transe", "nfe_k", "nfe_3"])
def test_no_small_step_from_the_solution_raises_the_scores(name):
    """All reciprocal, so that NFE-3 can take part: scores of (e, r, t), and of (e, r + R, h) for (h, r, e)."""
    with jax.enable_x64(True):
        family = make(name)
        params = draw(family, 2 * R)
        triples = triples_of(E)
        both = np.concatenate([triples, triples[:, ::-1] + np.array([0, R, 0])])
        scored = both[both[:, 0] == E] if name.startswith("nfe_3") else both
        row = cold_start(family, params, triples, R, contrast=0.0)
        value = jax.jit(lambda row: total(family, params, row, scored))
        best = value(row)
        for seed in range(8):
            rng = np.random.default_rng(seed)
            step = {part: 1e-2 * rng.standard_normal(values.shape) for part, values in row.items()}
            assert value({part: row[part] + step[part] for part in row}) < best


@pytest.mark.parametrize("name", ["rotate", "nfe_1", "nfe_1_sigma", "nfe_2 exact"])
def test_a_held_out_entity_of_a_planted_model_is_recovered_exactly(name):
    """Entities that the new one is related to lie where relations and their inverses move it."""
    with jax.enable_x64(True):
        family = make(name)
        params = draw(family)
        table, relations = params["entity"], family.relation(params["relation"])
        hidden = {part: values[0] for part, values in family.entity(rows(table, jnp.array([8]))).items()}
        for r in range(R):
            element = {part: values[r] for part, values in relations.items()}
            tail, head = family.act(element, hidden), family.act(family.inverse(element), hidden)
            table = {part: table[part].at[1 + r].set(tail[part]).at[4 + r].set(head[part]) for part in table}
        without = {**params, "entity": {part: values[:8] for part, values in table.items()}}
        for triples in (triples_of(8), triples_of(8)[:R], triples_of(8)[R:]):
            row = cold_start(family, without, triples, R, contrast=0.0)
            for part in row:
                np.testing.assert_allclose(row[part], hidden[part], atol=1e-9)
            scores = score(family, with_entity(without, row), jnp.asarray(triples))
            np.testing.assert_allclose(scores, 0, atol=1e-12)


def test_the_mean_is_that_of_the_formula():
    with jax.enable_x64(True):
        family = make("affine")
        params = draw(family)
        m, (s, shift) = params["entity"]["mean"], (params["relation"][part] for part in ("scale", "shift"))
        upper = sum(s[r] * (m[1 + r] - shift[r]) + s[r] * m[4 + r] + shift[r] for r in range(R))
        row = cold_start(family, params, triples_of(E), R, contrast=0.0)
        np.testing.assert_allclose(row["mean"], upper / (jnp.sum(s**2, axis=0) + R), atol=1e-12)


def test_an_entity_of_the_table_is_solved_again_without_a_look_at_its_row():
    with jax.enable_x64(True):
        family = make("affine")
        params = draw(family)
        row = cold_start(family, params, triples_of(0), R, entity=0)
        params["entity"]["mean"] = params["entity"]["mean"].at[0].set(7.0)
        np.testing.assert_array_equal(cold_start(family, params, triples_of(0), R, entity=0)["mean"], row["mean"])


def test_contrast_takes_off_the_mean_scores_over_all_entities():
    with jax.enable_x64(True):
        family = make("affine")
        params = draw(family)
        others = np.array([(E, r, e) for r in range(R) for e in range(E)])
        others = np.concatenate([others, others[:, ::-1]])

        @jax.jit
        def value(row):
            off = total(family, params, row, others) / E
            return total(family, params, row, triples_of(E)) - 0.3 * off

        row = cold_start(family, params, triples_of(E), R, contrast=0.3)
        for step in (1e-3, -1e-3):
            for k in range(D):
                assert value({"mean": row["mean"].at[k].add(step)}) < value(row)


@pytest.fixture(scope="module")
def inductive():
    """A model that never saw six people of the family tree, and the triples of these."""
    full, family = family_graph(), FAMILIES["nfe_1"](dimension=64)
    facts = np.concatenate([*full.splits.values()])
    people = np.random.default_rng(1).permutation(full.size)[:6]
    hidden = np.isin(facts[:, [0, 2]], people).sum(axis=1)
    known, own = facts[hidden == 0], facts[hidden == 1]
    graph = Graph("without", full.entities, full.relations, known, known[:50], known[:50])
    result = train_kge(family, graph, KgeTraining(valid_every=0))
    return full, family, jax.tree.map(lambda x: x[0], result.params), people, own


def test_an_entity_that_was_never_trained_ranks_the_other_half_of_its_triples(inductive):
    """Filtered: other answers, and the others that were not trained, are no rivals."""
    full, family, params, people, own = inductive
    count = len(full.relations)
    answers = both_ways(np.concatenate([*full.splits.values()]), count)
    reciprocal = {}
    for contrast in (None, 0.0, 0.5):
        ranks = []
        for person in people.tolist():
            mine = np.random.default_rng(0).permutation(own[(own[:, [0, 2]] == person).any(axis=1)])
            asked = both_ways(mine[1::2], count)
            asked = np.resize(asked[asked[:, 0] == person], (32, 3))
            table = params["entity"]
            if contrast is not None:
                row = cold_start(family, params, mine[::2], count, entity=person, contrast=contrast)
                table = {part: values.at[person].set(row[part]) for part, values in table.items()}
            scores = np.array(score_all(family, {**params, "entity": table}, *jnp.asarray(asked[:, :2]).T))
            own_scores = np.take_along_axis(scores, asked[:, 2:], axis=1)
            scores[:, people] = -np.inf
            for query, (h, r, _) in enumerate(asked):
                scores[query, answers[(answers[:, 0] == h) & (answers[:, 1] == r), 2]] = -np.inf
            ranks.extend(1 / (1 + (scores > own_scores).sum(axis=1)))
        reciprocal[contrast] = np.mean(ranks)
    chance = (1 / np.arange(1, full.size + 1)).mean()
    assert reciprocal[None] < 4 * chance
    assert reciprocal[0.0] > 10 * chance
    assert reciprocal[0.5] > reciprocal[0.0]


def test_contrast_keeps_a_new_entity_out_of_the_answers_to_other_questions(inductive):
    full, family, params, people, own = inductive
    questions = own[:200]  # between entities that were trained and others; no question here is about this person
    intruded = []
    for contrast in (0.0, 0.5):
        person = int(people[0])
        mine = own[(own[:, [0, 2]] == person).any(axis=1)]
        others = questions[(questions[:, [0, 2]] != person).all(axis=1)]
        row = cold_start(family, params, mine, len(full.relations), entity=person, contrast=contrast)
        table = {part: values.at[person].set(row[part]) for part, values in params["entity"].items()}
        scores = score_all(family, {**params, "entity": table}, *jnp.asarray(others[:, :2]).T)
        intruded.append(float((scores > scores[:, person, None]).sum(axis=1).mean()))
    assert intruded[1] > intruded[0]


# bad input


@pytest.mark.parametrize("name", ["distmult", "complex", "quate"])
def test_families_without_closed_form_are_refused_by_name(name):
    family = FAMILIES[name](dimension=D)
    params = family.init(jax.random.key(0), E, R)
    with pytest.raises(ValueError, match=f"{type(family).__name__} has no closed form"):
        cold_start(family, params, triples_of(E), R)


@pytest.mark.parametrize(
    ("triples", "message"),
    [
        (np.zeros((0, 3), int), f"new entity, id {E}, .*given are 0 triples"),
        (np.array([(0, 1, 2)]), f"must have the new entity, id {E}"),
        (np.array([(E, 1, E)]), "on one side and another one on the other"),
        (np.array([(E, 1, E + 1)]), rf"entity id {E + 1}, but ids there are 0\.\.{E - 1}"),
        (np.array([(E, R, 0)]), rf"relation id {R}, but ids there are 0\.\.{R - 1}"),
    ],
)
def test_triples_that_do_not_fit_are_refused(triples, message):
    family = make("affine")
    with pytest.raises(ValueError, match=message):
        cold_start(family, family.init(jax.random.key(0), E, R), triples, R)


@pytest.mark.parametrize("contrast", [-0.1, 1.0])
def test_a_contrast_out_of_range_is_refused(contrast):
    family = make("affine")
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        cold_start(family, family.init(jax.random.key(0), E, R), triples_of(E), R, contrast=contrast)


def test_nfe_3_without_reciprocal_relations_refuses_the_new_entity_as_tail():
    family = make("nfe_3")
    with pytest.raises(ValueError, match="Nfe3 has a closed form for triples"):
        cold_start(family, family.init(jax.random.key(0), E, R), triples_of(E), R)


def test_a_coordinate_that_all_triples_leave_open_is_reported():
    family = make("affine")
    params = family.init(jax.random.key(0), E, R)
    params["relation"]["scale"] = params["relation"]["scale"].at[0, 2].set(0.0)
    with pytest.raises(ValueError, match="leave a coordinate open"):
        cold_start(family, params, np.array([(E, 0, 1)]), R)
    assert np.isfinite(cold_start(family, params, np.array([(E, 0, 1), (E, 1, 2)]), R)["mean"]).all()


def test_moved_heads_of_the_appended_entity_are_those_of_its_row():
    family = make("affine")
    params = family.init(jax.random.key(0), E, R)
    grown = with_entity(params, cold_start(family, params, triples_of(E), R))
    x = moved(family, grown, jnp.array([E]), jnp.array([0]))["mean"][0]
    expected = params["relation"]["scale"][0] * grown["entity"]["mean"][E] + params["relation"]["shift"][0]
    np.testing.assert_allclose(x, expected, rtol=1e-6)
