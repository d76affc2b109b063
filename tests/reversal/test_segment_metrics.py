"""Measures of units, against counts by hand and loops over characters."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from permjax.reversal.segment import SegmentError, WordSegmenter, cut_text
from permjax.reversal.segment_metrics import boundaries, check_segmenter, compare, name_spans, spans, unsplit_rate

pytestmark = pytest.mark.fast

TEXT = "a b c d e f g h"
CUTS = st.sets(st.integers(1, len(TEXT) - 1))


def test_scores_of_a_case_counted_by_hand():
    scores = compare([("a b", " c d", " e f g h")], [("a b", " c", " d", " e f", " g h")])
    assert scores.boundary_precision == 1
    assert scores.boundary_recall == 0.5
    assert scores.boundary_f1 == pytest.approx(2 / 3)
    assert scores.span_f1 == pytest.approx(2 * 1 / (3 + 5))
    assert scores.words_per_unit == pytest.approx(8 / 3)


@given(CUTS, CUTS)
def test_scores_agree_with_sets_and_turn_round_with_their_arguments(found, wanted):
    a, b = cut_text(TEXT, found), cut_text(TEXT, wanted)
    scores, turned = compare([a], [b]), compare([b], [a])
    assert scores.boundary_precision == turned.boundary_recall
    assert scores.boundary_f1 == turned.boundary_f1
    assert scores.span_f1 == turned.span_f1
    assert scores.boundary_recall == (len(found & wanted) / len(wanted) if wanted else 1)
    assert (scores.boundary_f1 == 1) == (found == wanted)


@given(CUTS, st.integers(0, 14), st.integers(0, 14))
def test_a_span_is_unsplit_if_no_cut_lies_inside(cuts, start, end):
    start, end = min(start, end), max(start, end) + 1
    expected = not any(start < cut < end for cut in cuts)
    assert unsplit_rate([cut_text(TEXT, cuts)], [[(start, end)]]) == expected


@given(CUTS)
def test_boundaries_and_spans_are_the_cuts(cuts):
    units = cut_text(TEXT, cuts)
    assert boundaries(units) == sorted(cuts)
    assert [TEXT[start:end] for start, end in spans(units)] == list(units)


def test_names_are_found_wherever_they_occur():
    assert name_spans("Ann and Anna", ["Ann", "Anna", "", "Tom"]) == [(0, 3), (8, 11), (8, 12)]


def test_units_of_other_texts_are_refused():
    with pytest.raises(SegmentError, match="compared with"):
        compare([("a",)], [("b",)])


def test_nothing_to_measure_is_no_fault():
    assert compare([()], [()]).boundary_f1 == 1
    assert unsplit_rate([], []) == 1
    assert check_segmenter(WordSegmenter(), []).lossless == 1


def test_a_segmenter_that_loses_text_is_seen():
    check = check_segmenter(lambda text: tuple(text.split()), ["one", "two words", "three", ""])
    assert check.lossless == 0.75
    assert check.words_per_second > 0
