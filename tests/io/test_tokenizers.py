"""Tokenizers: what they decode is what they encoded, and their offsets point at it."""

from itertools import pairwise

import pytest

from permjax.io.tokenizers import WordTokenizer, check_size, load_tokenizer, train_byte_bpe

pytestmark = pytest.mark.fast

TEXTS = [
    "Danielle Darrieux speaks French, and Léon Blum's mother tongue is French.",
    "Ann-Marie doesn't sing; 12 naïve 東京 singers do.",
]
WORDS = WordTokenizer(("<unk>", "Ann", "'s", "cat", "sings", ".", "doesn't"), unknown="<unk>")


def test_words_and_punctuation_are_tokens_wherever_they_stand():
    ids, offsets = WORDS.encode("Ann's cat  sings.cat")
    assert [WORDS.words[number] for number in ids] == ["Ann", "'s", "cat", "sings", ".", "cat"]
    assert ["Ann's cat  sings.cat"[first:last] for first, last in offsets] == ["Ann", "'s", "cat", "sings", ".", "cat"]
    assert WORDS.decode(ids) == "Ann 's cat sings . cat"
    assert WORDS.encode("cat doesn't").ids == WORDS.encode("doesn't cat").ids[::-1]


def test_unknown_words_are_named_unless_one_stands_for_them():
    assert WORDS.encode("a cat").ids == (0, 3)
    with pytest.raises(ValueError, match="The word 'dog' is not one of the 2"):
        WordTokenizer(("a", "cat")).encode("a dog")


def test_words_must_differ_and_have_the_unknown_one():
    with pytest.raises(ValueError, match="must differ"):
        WordTokenizer(("a", "b", "a"))
    with pytest.raises(ValueError, match="'<unk>', must be one of the words"):
        WordTokenizer(("a", "b"), unknown="<unk>")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    check_size(WORDS, 7)
    check_size(WORDS, 8)
    with pytest.raises(ValueError, match="has 7 tokens, but the model knows 6"):
        check_size(WORDS, 6)


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed; it is in the extra `text`.")
    return train_byte_bpe(TEXTS * 3, 300)


def test_bytes_spell_every_text(bpe):
    assert 256 < bpe.size <= 300
    for text in (*TEXTS, "never seen: ½ \n\t 漢字 \U0001f600"):
        ids, offsets = bpe.encode(text)
        assert bpe.decode(ids) == text
        assert max(ids) < bpe.size
        assert len(ids) == len(offsets)
        assert offsets[0][0] == 0
        assert offsets[-1][1] == len(text)
        assert all(a <= b for (_, a), (_, b) in pairwise(offsets))


def test_merges_are_learnt(bpe):
    assert len(bpe.encode(TEXTS[0]).ids) < 0.8 * len(TEXTS[0].encode())


def test_a_saved_tokenizer_is_read_from_its_file_or_its_folder(bpe, tmp_path):
    bpe.inner.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(path)
        assert again.size == bpe.size
        assert again.encode(TEXTS[1]) == bpe.encode(TEXTS[1])


def test_special_tokens_are_added_as_the_file_says_and_stand_for_no_character(bpe, tmp_path):
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(bpe.inner.to_str())
    inner.add_special_tokens(["<s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.size)])
    inner.save(str(tmp_path / "tokenizer.json"))
    added, plain = load_tokenizer(tmp_path), load_tokenizer(tmp_path, special=False)
    assert plain.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    assert added.encode(TEXTS[0]).ids == (bpe.size, *plain.encode(TEXTS[0]).ids)
    assert added.encode(TEXTS[0]).offsets[0] == (0, 0)
    assert added.decode(added.encode(TEXTS[0]).ids) == TEXTS[0]
    assert added.size == bpe.size + 1


def test_what_is_no_tokenizer_is_refused(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="256 or more"):
        train_byte_bpe(TEXTS, 255)
