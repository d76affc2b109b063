"""Rows of tokens: where the subject ends and which tokens are to be predicted, for tokenizers of every kind."""

import numpy as np
import pytest

from permjax.edit.prepare import prepare, prepare_all, scored
from permjax.edit.requests import EditRequest
from permjax.io.tokenizers import Encoding, FileTokenizer, WordTokenizer, train_byte_bpe

pytestmark = pytest.mark.fast

REQUEST = EditRequest("The mother tongue of {}'s wife is", "Danielle Darrieux", "Old English", "French")
FIRST = EditRequest("{} plays", "Zoë", "chess")
PREFIXES = ("He said that", "In May.")
WORDS = tuple(
    "_ The mother tongue of 's wife is Danielle Darrieux Old English plays Zoë chess He said that In May . a".split()
)


def with_marks(tokenizer):
    """The tokenizer with a token at the beginning and one at the end."""
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(tokenizer.inner.to_str())
    inner.add_special_tokens(["<s>", "</s>"])
    marks = [("<s>", tokenizer.size), ("</s>", tokenizer.size + 1)]
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return FileTokenizer(inner)


@pytest.fixture(scope="module", params=["words", "bytes", "bytes with marks"])
def tokenizer(request):
    if request.param == "words":
        return WordTokenizer(WORDS)
    pytest.importorskip("tokenizers", reason="tokenizers is not installed; it is in the extra `text`.")
    bpe = train_byte_bpe([" ".join(WORDS), REQUEST.text, *PREFIXES] * 3, 330)
    return bpe if request.param == "bytes" else with_marks(bpe)


@pytest.mark.parametrize("request_", [REQUEST, FIRST])
def test_rows_hold_prefix_prompt_and_target_and_the_targets_follow_the_prompt(tokenizer, request_):
    edit = prepare(request_, tokenizer, prefixes=PREFIXES, pad_to=40)
    texts = [request_.text, *(f"{prefix} {request_.text}" for prefix in PREFIXES)]
    assert edit.tokens.shape == edit.targets.shape == (3, 40)
    for text, row, targets, length in zip(texts, edit.tokens, edit.targets, edit.lengths, strict=True):
        assert tokenizer.decode(row[:length]) == plain(tokenizer, f"{text} {request_.target}")
        (places,) = np.nonzero(targets >= 0)
        np.testing.assert_array_equal(places, np.arange(places[0], length - 1))  # at the end, without a gap
        np.testing.assert_array_equal(targets[places], row[places + 1])
        assert tokenizer.decode(row[: places[0] + 1]) == plain(tokenizer, text)
        assert not row[length:].any()


@pytest.mark.parametrize("request_", [REQUEST, FIRST])
def test_the_subject_ends_where_it_ends(tokenizer, request_):
    edit = prepare(request_, tokenizer, prefixes=PREFIXES, pad_to=40)
    head = request_.text[: request_.subject_end]
    for prefix, row, place in zip(("", *PREFIXES), edit.tokens, edit.subject, strict=True):
        assert tokenizer.decode(row[: place + 1]) == plain(tokenizer, f"{prefix} {head}".strip())
        assert tokenizer.decode(row[:place]) != plain(tokenizer, f"{prefix} {head}".strip())


def test_the_essence_is_a_row_of_the_same_length(tokenizer):
    edit = prepare(REQUEST, tokenizer, prefixes=(), pad_to=40, essence="{} is a")
    assert edit.kl_tokens.shape == (40,)
    assert tokenizer.decode(edit.kl_tokens[: edit.kl_subject + 1]) == plain(tokenizer, "Danielle Darrieux")
    length = len(tokenizer.encode("Danielle Darrieux is a").ids)
    assert not edit.kl_tokens[length:].any()


def plain(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text).ids)


def test_all_requests_get_rows_of_one_shape(tokenizer):
    edits = prepare_all([REQUEST, FIRST], tokenizer, prefixes=PREFIXES)
    longest = max(edit.lengths.max() for edit in edits)
    for edit in edits:
        assert edit.tokens.shape[1] % 8 == 0
        assert longest <= edit.tokens.shape[1] < longest + 8
    for one, request in zip(edits, (REQUEST, FIRST), strict=True):
        again = prepare(request, tokenizer, prefixes=PREFIXES, pad_to=one.tokens.shape[1])
        assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))


def test_arrays_are_int32():
    edit = prepare(REQUEST, WordTokenizer(WORDS), prefixes=PREFIXES, pad_to=20)
    assert {leaf.dtype for leaf in edit} == {np.dtype(np.int32)}
    assert edit.kl_subject.shape == ()


def test_any_prompts_are_scored_with_their_own_answers(tokenizer):
    rows = scored(["Zoë plays", "The wife of Zoë is "], ["chess", " English"], tokenizer, pad_to=30)
    for row, targets, answer in zip(rows.tokens, rows.targets, ("chess", "English"), strict=True):
        assert tokenizer.decode(row[1:][targets[:-1] >= 0]).strip() == answer


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="A row has 11 tokens, but rows of 9 were asked for"):
        prepare(REQUEST, WordTokenizer(WORDS), prefixes=PREFIXES, pad_to=9)


class Pieces:
    """A tokenizer that cuts texts every three characters, and forgets some."""

    size = 1000

    def __init__(self, forgotten="nothing"):
        self.forgotten = forgotten

    def decode(self, ids):
        raise NotImplementedError

    def encode(self, text):
        spans = [
            (first, min(first + 3, len(text)))
            for first in range(0, len(text), 3)
            if self.forgotten not in text[first : first + 3]
        ]
        return Encoding(tuple(range(len(spans))), tuple(spans))


def test_a_token_across_the_end_of_the_prompt_is_refused():
    assert prepare(EditRequest("ab {}", "Ann", "chess"), Pieces(), prefixes=(), pad_to=9).lengths == 4
    with pytest.raises(ValueError, match="do not tell the prompt 'a Ann' from the target"):
        prepare(EditRequest("a {}", "Ann", "chess"), Pieces(), prefixes=(), pad_to=9)


def test_a_subject_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no token for the end of the subject in 'ab,Ann'"):
        prepare(EditRequest("ab,{}", "Ann", "chess"), Pieces("Ann"), prefixes=(), pad_to=9)
