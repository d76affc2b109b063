"""Sentences to measure language models on, by corpus: text files, and lists of records as those of ME-PPL."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from permjax.data.text import read_text


def read_corpora(paths: Iterable[str | Path], *, most: int | None = None) -> dict[str, list[str]]:
    """The sentences of some files by corpus; what files say of one corpus is put together.

    Args:
        paths: `.json` files with a list of records `{"Corpus": name, "Text": sentence}`, as ME-PPL has them, or text
            files with a sentence in each line, whose corpus is named after the file.
        most: sentences of a corpus, taken at even distances; all by default.

    Raises:
        MissingData: there is no such file.
        ValueError: a file is empty, not in UTF-8, or holds no such list; names the file and the record.

    Example:
        >>> read_corpora(["ME-PPL_50.json"], most=16)["Wikipedia"]  # doctest: +SKIP
    """
    found: dict[str, list[str]] = {}
    for path in map(Path, paths):
        content = read_text(path, "the option for text files")
        pairs = (
            _records(path, content) if path.suffix == ".json" else [(path.stem, line) for line in content.split("\n")]
        )
        some = [(corpus, text.strip()) for corpus, text in pairs if text.strip()]
        if not some:
            raise ValueError(f"{path} has no sentence; give a file with a sentence in each line.")
        for corpus, text in some:
            found.setdefault(corpus, []).append(text)
    return {corpus: texts[:: -(-len(texts) // (most or len(texts)))] for corpus, texts in found.items()}


def _records(path: Path, content: str) -> list[tuple[str, str]]:
    try:
        records: Any = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); give a list of records, or a text file.") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} holds a JSON {type(records).__name__} in place of a list of records.")
    for number, record in enumerate(records):
        if not (isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("Corpus", "Text"))):
            message = f"{path}: record {number} has no text under 'Corpus' and 'Text'; "
            raise ValueError(message + 'records look like {"Corpus": "Wikipedia", "Text": "A sentence."}.')
    return [(record["Corpus"], record["Text"]) for record in records]
