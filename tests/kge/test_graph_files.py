import dataclasses
import os

import numpy as np
import pytest

from permjax.data.dataset import MissingData
from permjax.kge.family import family_graph
from permjax.kge.graph import GraphError, knowledge_graph, load_graph, save_graph

pytestmark = pytest.mark.fast
needs_data = pytest.mark.skipif("PERMJAX_DATA" not in os.environ, reason="PERMJAX_DATA names no folder of real data")

LABELS = {"train": "bob\tlikes\tann\nann\tknows\tcid\r\n\n", "valid": "cid\tlikes\tann\n", "test": "ann\tknows\tann"}
IDS = {
    "entity2id": "zoe the first\t1\nann\t0\ncid\t2\n",
    "relation2id": "likes\t0\nknows\t1\n",
    "train2id": "1\t0\t0\n0\t1\t2\n",
    "valid2id": "2 0 0\n",
    "test2id": "0\t1\t0\n",
}


@pytest.fixture
def write(tmp_path):
    """`write(files, name=other content)`: a folder with those files."""

    def write_all(files, **changes):
        for name, content in {**files, **changes}.items():
            (tmp_path / f"{name}.txt").write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path

    return write_all


def labels(graph, split):
    return [(graph.entities[h], graph.relations[r], graph.entities[t]) for h, r, t in graph.splits[split]]


def test_label_triples_are_read_in_their_order_with_ids_in_alphabetical_order(write):
    graph = load_graph(write(LABELS), "people")
    assert (graph.name, graph.entities, graph.relations) == ("people", ("ann", "bob", "cid"), ("knows", "likes"))
    assert labels(graph, "train") == [("bob", "likes", "ann"), ("ann", "knows", "cid")]
    assert labels(graph, "test") == [("ann", "knows", "ann")]
    assert graph.notes == ()


def test_ids_are_read_as_they_are(write):
    graph = load_graph(write(IDS))
    assert graph.entities == ("ann", "zoe the first", "cid")
    assert labels(graph, "train") == [("zoe the first", "likes", "ann"), ("ann", "knows", "cid")]


def test_files_that_start_with_their_length_have_the_relation_last(write):
    openke = {name: f"{len(content.splitlines())}\n{content}" for name, content in IDS.items()}
    graph = load_graph(write(openke, train2id="2\n1 0 0\n0 2 1\n", valid2id="1\n2 0 0\n", test2id="1\n0 0 1\n"))
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(graph.splits[split], load_graph(write(IDS)).splits[split])


def test_a_graph_comes_back_from_an_archive_as_it_was(tmp_path):
    family = dataclasses.replace(family_graph(couples=4, generations=3), notes=("Made up.",))
    save_graph(family, tmp_path / "family.npz")
    again = load_graph(tmp_path / "family.npz")
    for field in ("name", "entities", "relations", "rules", "notes"):
        assert getattr(again, field) == getattr(family, field)
    for split, triples in family.splits.items():
        np.testing.assert_array_equal(again.splits[split], triples)
    assert load_graph(tmp_path / "family.npz", "another").name == "another"


def test_the_name_folder_reads_a_path_below_the_root(write):
    folder = write(LABELS)
    assert knowledge_graph("folder", folder.parent, path=folder.name).entities == ("ann", "bob", "cid")


def test_repeated_train_triples_are_dropped_and_all_else_is_kept_and_reported(write):
    twice = "bob\tlikes\tann\n"
    graph = load_graph(write(LABELS, train=LABELS["train"] + twice * 2, valid=2 * "new\tlikes\tann\n"))
    assert len(graph.train) == 2
    assert len(graph.valid) == 2
    assert "2 repeated train triples were dropped." in graph.notes
    assert "1 valid triples are repetitions; they are kept and count each time." in graph.notes
    assert "2 valid triples have entities that train does not have; they are kept." in graph.notes
    assert "1 of 4 entities are not in train, such as 'new'." in graph.notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "bob\tlikes\tann\nbob likes ann\n"}, r"train\.txt, line 2: 'bob likes ann' must be head"),
        ({"valid": "\ncid\tlikes\t\n"}, r"valid\.txt, line 2: .* must be head, relation and tail, parted by tabs"),
        ({"test": "a\tlikes\tb\tc"}, r"test\.txt, line 1"),
        ({"test": "\n"}, "split test of the graph .* is empty"),
        ({"test": "ann\thates\tbob"}, "'hates' has 1 test triples in .* but none in train"),
        ({"valid": b"ann\tlikes\tb\xff"}, r"valid\.txt is no text in UTF-8"),
    ],
)
def test_bad_label_triples_name_file_and_line(write, changes, message):
    with pytest.raises(GraphError, match=message):
        load_graph(write(LABELS, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train2id": "1\t0\t0\n0\t1\t7\n"}, r"train2id\.txt, line 2: the tail id 7 is out of range; ids are 0\.\.2"),
        ({"test2id": "0\t2\t0\n"}, r"test2id\.txt, line 1: the relation id 2 is out of range; ids are 0\.\.1"),
        ({"valid2id": "2\t0\n"}, r"valid2id\.txt, line 1: .* must be three ids"),
        ({"valid2id": "-2\t0\t0\n"}, r"valid2id\.txt, line 1: .* must be three ids"),
        ({"valid2id": "5\n2 0 0\n"}, "says that it has 5 lines, but 1 follow"),
        ({"valid2id": ""}, "split valid of the graph .* is empty"),
        ({"entity2id": "ann\t0\nbob\t5\ncid\t2\n"}, r"entity2id\.txt, line 2: the id 5 is out of range or taken"),
        ({"entity2id": "ann\t0\nbob\t1\ncid\t1\n"}, r"entity2id\.txt, line 3: the id 1 is out of range or taken"),
        ({"relation2id": "likes\nknows\t1\n"}, r"relation2id\.txt, line 1: 'likes' must be a name and its id"),
        ({"relation2id": "likes\t0\nlikes\t1\n"}, "two relation ids for 'likes'"),
    ],
)
def test_bad_ids_name_file_and_line(write, changes, message):
    with pytest.raises(GraphError, match=message):
        load_graph(write(IDS, **changes))


def test_a_file_that_is_not_there_is_named(write):
    folder = write(LABELS)
    (folder / "valid.txt").unlink()
    with pytest.raises(MissingData, match=r"valid\.txt"):
        load_graph(folder)
    with pytest.raises(MissingData, match="nowhere"):
        load_graph(folder / "nowhere")


def test_an_archive_without_its_arrays_or_with_ids_out_of_range_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(GraphError, match=r"other\.npz .*no array 'name'"):
        load_graph(tmp_path / "other.npz")
    save_graph(family_graph(couples=4, generations=3), tmp_path / "wrong.npz")
    arrays = {**np.load(tmp_path / "wrong.npz")}
    arrays["test"][4, 2] = 10_000
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(GraphError, match="Triple 4 of the test triples of family has the tail id 10000"):
        load_graph(tmp_path / "wrong.npz")


@pytest.mark.data
@needs_data
@pytest.mark.parametrize(
    ("name", "sizes", "unseen"),
    [
        ("umls", (135, 46, 5216, 652, 661), 0),
        ("nations", (14, 55, 1592, 199, 201), 0),
        ("kinships", (104, 25, 8544, 1068, 1074), 0),
        ("codex-s", (2034, 42, 32888, 1827, 1828), 0),
        ("wn18rr", (40943, 11, 86835, 3034, 3134), 384),
        ("fb15k237", (14541, 237, 272115, 17535, 20466), 36),
    ],
)
def test_the_known_graphs_have_their_known_sizes(name, sizes, unseen):
    found = knowledge_graph(name)
    assert (found.size, len(found.relations), *map(len, found.splits.values())) == sizes
    assert len(found.unseen) == unseen
