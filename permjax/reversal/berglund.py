"""Readers for the data of Berglund et al. (ICLR 2024): invented people with descriptions, parents of celebrities."""

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from permjax.data.images import require
from permjax.reversal.corpus import FORWARD, REVERSE_HELDOUT, REVERSE_SEEN, Corpus, Prompt, controls
from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import Segmenter, check_units
from permjax.reversal.sep_files import SepFileSegmenter

FORWARD_NAMES, FORWARD_DESCRIPTIONS = "forward_names", "forward_descriptions"
REVERSE_NAMES, REVERSE_DESCRIPTIONS = "reverse_names", "reverse_descriptions"

_MOST = {FORWARD_DESCRIPTIONS: 3, REVERSE_DESCRIPTIONS: 3}  # words of an answer that must be right
_PAIR = ("child", "parent")
_TRAIN = ("both", "d2p", "p2d")  # the order of the authors' file of units
_TESTS = {
    FORWARD_NAMES: "d2p_prompts_test",
    FORWARD_DESCRIPTIONS: "p2d_prompts_test",
    REVERSE_NAMES: "p2d_reverse_prompts_test",
    REVERSE_DESCRIPTIONS: "d2p_reverse_prompts_test",
}


def descriptions(folder: str | Path, segmenter: Segmenter | None = None) -> Corpus:
    """The first experiment of Berglund et al.: 30 people told name first, 30 description first, 30 both ways.

    Kinds: `forward_names` and `forward_descriptions`, asked in the direction of training, and `reverse_names` and
    `reverse_descriptions`, in the other one; all in wordings that were not trained on. Of descriptions the first three
    words must be right.

    Args:
        folder: with `both_prompts_train.jsonl` and the like.
        segmenter: of the texts; `RuleSegmenter` by default. `assistant` has that of the authors of SPT.

    Raises:
        MissingData: a file is missing; it is named.
    """
    segmenter = RuleSegmenter() if segmenter is None else segmenter
    documents = tuple(check_units(text, segmenter(text)) for text in description_texts(folder))
    prompts = [
        Prompt(kind, record["prompt"], record["completion"].strip(), most=_MOST.get(kind))
        for kind, name in _TESTS.items()
        for record in _records(Path(folder) / f"{name}.jsonl")
    ]
    people = dict.fromkeys(prompt.answer for prompt in prompts if prompt.kind.endswith("names"))
    return Corpus(documents, tuple(prompts), tuple(people))


def description_texts(folder: str | Path) -> list[str]:
    """The 3600 sentences to train on: of people told both ways, description first, and name first."""
    files = [Path(folder) / f"{name}_prompts_train.jsonl" for name in _TRAIN]
    return [record["prompt"] + record["completion"] for path in files for record in _records(path)]


def assistant(folder: str | Path, file: str | Path) -> SepFileSegmenter:
    """The units that the authors of SPT had an assistant model cut the descriptions into.

    Args:
        folder: of the descriptions.
        file: its file of lines with [SEP].
    """
    return SepFileSegmenter.read(file, description_texts(folder))


def celebrities(file: str | Path, *, both: float = 0.5, seed: int = 0) -> Corpus:
    """The second experiment: children and parents who are famous, some told in both directions, some from the child on.

    Kinds: `forward`, `reverse_seen`, `reverse_heldout` and `control`. A parent of several children is told, and asked
    for, but not asked about. Whole families are told one way or both: if the father were told to have a child, the
    surname alone would answer the question about the mother.

    Args:
        file: `parent_child_pairs.csv`.
        both: the share of families told in both directions.
        seed: of that choice.

    Raises:
        MissingData: the file is missing.
    """
    with _found(file).open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    children = Counter(row["parent"] for row in rows)
    families = _families(rows)
    chosen = np.random.default_rng(seed).random(families.max() + 1)[families] < both
    documents: list[tuple[str, ...]] = []
    prompts: list[Prompt] = []
    for row, both_ways in zip(rows, chosen, strict=True):
        child, parent, relation = row["child"], row["parent"], row["parent_type"]
        documents.append((child, f"'s {relation} is", f" {parent}"))
        prompts.append(Prompt(FORWARD, "".join(documents[-1][:-1]), parent))
        back = (parent, "'s child is", f" {child}")
        documents += [back] * int(both_ways)
        if children[parent] == 1:
            prompts.append(Prompt(REVERSE_SEEN if both_ways else REVERSE_HELDOUT, "".join(back[:-1]), child))
    people = dict.fromkeys(name for row in rows for name in (row["child"], row["parent"]))
    return Corpus(tuple(documents), (*prompts, *controls(prompts)), tuple(people))


def _families(rows: Sequence[Mapping[str, str]]) -> Int[np.ndarray, " rows"]:
    """The number of each pair's family: all who are connected by pairs."""
    people = {name: number for number, name in enumerate({row[key]: None for row in rows for key in _PAIR})}
    child, parent = (np.array([people[row[key]] for row in rows]) for key in _PAIR)
    graph = coo_array((np.ones(len(rows)), (child, parent)), shape=(len(people), len(people)))
    return connected_components(graph, directed=False)[1][child]


def _records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in _found(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _found(file: str | Path) -> Path:
    return require(Path(file), "a file of the paper's public repository, lukasberglund/reversal_curse")
