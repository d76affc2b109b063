"""Edits from templates for any tokenizer."""

import pytest

from permjax.edit.hard_cases import is_hard
from permjax.edit.templates import NAMES, TEMPLATES, template_cases
from permjax.io.tokenizers import WORD, WordTokenizer, train_byte_bpe

pytestmark = pytest.mark.fast


def words(names):
    told = [part for one in TEMPLATES for part in (one.first, one.mid, *one.targets)]
    return WordTokenizer((*dict.fromkeys(word for line in (*told, *names) for word in WORD.findall(line)), "?"), "?")


def test_every_hard_edit_has_a_control_with_its_subject_and_target():
    tokenizer = words(NAMES)
    hard, controls = template_cases(tokenizer, 20, seed=1)
    assert len(hard) == len(controls) == 20
    for one, other in zip(hard, controls, strict=True):
        assert is_hard(one, tokenizer)
        assert not is_hard(other, tokenizer)
        assert (one.subject, one.target) == (other.subject, other.target)
        assert (one.paraphrases, other.paraphrases) == ((other.text,), (one.text,))
        assert all(one.subject not in text for text in (*one.neighbours, *other.neighbours))
    assert len({one.text for one in hard}) == 20
    assert template_cases(tokenizer, 20, seed=1) == (hard, controls)
    assert template_cases(tokenizer, 20, seed=2).hard != hard
    assert len(template_cases(tokenizer, 1000).hard) == 3 * len(NAMES)


def test_a_tokenizer_that_spells_every_name_is_refused():
    pytest.importorskip("tokenizers", reason="tokenizers is not installed; it is in the extra `text`.")
    with pytest.raises(ValueError, match="None of 48 first names is one token"):
        template_cases(train_byte_bpe(["a b"], 256), 4)
