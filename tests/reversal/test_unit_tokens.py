"""From units of characters to units of tokens."""

import bisect

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import WordSegmenter, cut_text
from permjax.reversal.tokens import encoder, needs_prefix_space, unit_ids, unit_tokens, with_prefix_space

pytestmark = pytest.mark.fast

TEXT = "The small dog sees Ann Lee's bird."


def ids_of(units, offsets):
    ids, snapped = unit_ids(units, offsets)
    return ids.tolist(), snapped


@st.composite
def cut_and_tokenized(draw):
    """A text of n characters, cuts, and tokens with gaps between some of them."""
    n = draw(st.integers(1, 30))
    places = st.sets(st.integers(1, n - 1)) if n > 1 else st.just(set())
    ends = [*sorted(draw(places)), n]
    offsets = [(draw(st.integers(start, end - 1)), end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return "x" * n, draw(places), offsets


@given(cut_and_tokenized())
def test_ids_count_up_from_zero_and_agree_with_a_loop_over_characters(drawn):
    text, cuts, offsets = drawn
    units = cut_text(text, cuts)
    unit_of = [number for number, unit in enumerate(units) for _ in unit]
    last = [unit_of[end - 1] for _, end in offsets]
    dense = sorted(set(last))
    ids, snapped = ids_of(units, offsets)
    assert ids == [bisect.bisect_left(dense, unit) for unit in last]
    inner = [k for start, end in offsets for k in range(start + 1, end) if unit_of[k] != unit_of[k - 1]]
    assert snapped == len(inner)


def test_a_cut_inside_a_token_moves_to_its_start_and_is_counted():
    assert ids_of(["The do", "g barks"], [(0, 3), (4, 7), (8, 13)]) == ([0, 1, 1], 1)


def test_a_cut_in_the_white_space_between_tokens_is_not_counted():
    for offsets in ([(0, 3), (3, 7)], [(0, 3), (4, 7)], [(0, 4), (4, 7)]):
        assert ids_of(["The", " dog"], offsets) == ([0, 1], 0)
    assert ids_of(["The", " dog"], [(0, 3), (3, 4), (4, 7)]) == ([0, 1, 1], 0)


def test_a_unit_without_a_token_leaves_no_gap():
    assert ids_of(["a", "b", "c", "d"], [(0, 1), (1, 3), (3, 4)]) == ([0, 1, 2], 1)


def test_tokens_without_characters_go_with_the_token_before_them():
    assert ids_of(["The", " dog"], [(0, 0), (0, 3), (3, 7), (0, 0)]) == ([0, 0, 1, 1], 0)


def test_several_tokens_of_one_character_stay_together():
    assert ids_of(["a", "👩", "b"], [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]) == ([0, 1, 1, 1, 2], 0)


def test_an_empty_text_has_no_ids():
    ids, snapped = unit_ids([], [])
    assert ids.shape == (0,)
    assert ids.dtype == np.int32
    assert snapped == 0


def test_without_a_segmenter_each_token_is_a_unit():
    found = unit_tokens(TEXT, lambda text: ([ord(c) for c in text], [(k, k + 1) for k in range(len(text))]))
    assert found.unit_ids.tolist() == list(range(len(TEXT)))
    assert found.snapped == 0


def test_a_space_is_set_before_a_text_once():
    assert with_prefix_space("dog") == " dog" == with_prefix_space(" dog")
    assert with_prefix_space("") == ""


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

        def __call__(self, _):
            return [0]

    for wrong in (Slow(), "gpt2"):
        with pytest.raises(TypeError, match="cannot say which characters"):
            encoder(wrong)


# real tokenizers


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE of 300 tokens, trained on the text itself."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([f" {TEXT} the the 👩 é"] * 3, vocab_size=330, min_frequency=1, show_progress=False)
    return tokenizer._tokenizer


@pytest.fixture(scope="module")
def word_level():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def test_units_of_a_byte_level_tokenizer_are_the_units_of_the_text(byte_level):
    text = with_prefix_space(TEXT)
    for segmenter in (RuleSegmenter(), WordSegmenter()):
        tokens, ids, snapped = unit_tokens(text, encoder(byte_level), segmenter)
        parts = tuple(byte_level.decode(tokens[ids == unit].tolist()) for unit in range(ids.max() + 1))
        assert parts == segmenter(text)
        assert snapped == 0


def test_only_tokenizers_that_write_the_first_word_otherwise_need_a_space(byte_level, word_level):
    assert needs_prefix_space(encoder(byte_level))
    assert not needs_prefix_space(encoder(word_level))


def test_with_the_space_a_name_has_the_same_tokens_wherever_its_unit_goes(byte_level):
    encode = encoder(byte_level)
    first, _ = encode(with_prefix_space("Ann Lee"))
    inside, _ = encode(with_prefix_space("The small Ann Lee"))
    assert list(inside)[-len(first) :] == list(first)
    assert list(encode("Ann Lee")[0]) != list(first)


def test_a_fast_tokenizer_of_transformers_gives_the_same_units(byte_level):
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level)
    (a, *rest), (b, *other) = (unit_tokens(TEXT, encoder(each), RuleSegmenter()) for each in (byte_level, fast))
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(rest[0], other[0])
