"""Text as windows of characters: files, splits, invented sentences, bad input."""

import numpy as np
import pytest

from permjax.data.dataset import MissingData
from permjax.data.registry import load
from permjax.data.text import windows

pytestmark = pytest.mark.fast


def spelled(data, rows):
    return "".join(data.vocabulary[i] for i in rows.ravel())


@pytest.fixture
def poem(tmp_path):
    content = "".join(chr(97 + i % 7) + "é\n" for i in range(60))
    (tmp_path / "poem.txt").write_text(content, encoding="utf-8")
    return tmp_path, content


def test_windows_cover_the_text_in_order_and_labels_are_the_next_characters(poem):
    root, content = poem
    data = load("text", root, path="poem.txt", length=8, test_share=0.25)
    assert data.vocabulary == "".join(sorted(set(content)))
    assert data.x_train.shape == data.y_train.shape == (16, 8)
    assert data.x_train.dtype == data.y_train.dtype == np.int32
    assert spelled(data, data.x_train) == content[:128]
    assert spelled(data, data.y_train) == content[1:129]
    assert spelled(data, data.x_test) == content[135 : 135 + data.x_test.size]
    assert spelled(data, data.y_test) == content[136 : 136 + data.x_test.size]
    assert data.name == "poem"


def test_no_character_of_the_test_part_is_trained_on(poem):
    _, content = poem
    data = windows(content[:100] + "#" * 40, length=8, test_share=40 / 140, name="n")
    last = data.vocabulary.index("#")
    assert not (data.x_train == last).any()
    assert not (data.y_train == last).any()
    assert (data.x_test == last).all()


def test_only_the_start_is_read_where_that_is_asked(poem):
    root, content = poem
    data = load("text", root, path="poem.txt", length=4, characters=50)
    assert data.x_train.size + data.x_test.size < 50
    assert set(data.vocabulary) == set(content[:50])


def test_the_folder_of_data_may_come_from_the_environment(poem, monkeypatch):
    monkeypatch.setenv("PERMJAX_DATA", str(poem[0]))
    assert load("text", path="poem.txt", length=8).name == "poem"


def test_sentences_follow_their_seed_alone():
    first, again, other = (load("sentences", seed=s, characters=3000) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.x_train, again.x_train)
    assert spelled(first, first.x_train) != spelled(other, other.x_train)
    assert len(spelled(first, first.x_train)) + first.x_test.size > 2800


def test_sentences_keep_their_grammar():
    data = load("sentences", characters=20_000, length=32)
    sentences = spelled(data, data.x_train).replace("\n", " ").split(". ")[:-1]
    assert len(sentences) > 300
    for sentence in sentences:
        words = sentence.lower().split()
        assert words[0] in ("ne", "lo")
        verb = next(i for i, word in enumerate(words[3:], 3) if word in ("ne", "lo")) - 1
        assert words[verb].endswith("en" if words[0] == "lo" else "it")
        assert words[verb - 1].endswith("s") == (words[0] == "lo")


def test_there_is_more_to_learn_than_single_characters():
    """Knowing three characters, the next one is far less uncertain than knowing none."""
    stream = load("sentences", characters=100_000).x_train.ravel()

    def bits(length):
        runs = sum(stream[i : len(stream) - length + i] * 100**i for i in range(length))
        shares = np.unique(runs, return_counts=True)[1] / (len(stream) - length)
        return -(shares * np.log2(shares)).sum()

    assert bits(1) > 3
    assert bits(4) - bits(3) < 0.55 * bits(1)


def test_bad_input_is_named(poem, tmp_path):
    root, _ = poem
    with pytest.raises(MissingData, match=r"no .*other.txt.*the option `path`"):
        load("text", root, path="other.txt")
    with pytest.raises(ValueError, match="needs the option 'path'"):
        load("text", root)
    with pytest.raises(ValueError, match=r"poem has 162 characters for training and 18 for testing.*need 33"):
        load("text", root, path="poem.txt", length=32)
    with pytest.raises(ValueError, match="test_share must lie between 0 and 1"):
        load("text", root, path="poem.txt", test_share=1.0)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(ValueError, match=r"bytes.txt is no text in UTF-8 .* at byte 0"):
        load("text", tmp_path, path="bytes.txt")
