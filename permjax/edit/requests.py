"""What is to be edited, and the files it is read from: CounterFact, zsRE and EasyEdit records."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

SLOT = "{}"


@dataclass(frozen=True)
class EditRequest:
    """A fact that is to be changed.

    Attributes:
        prompt: a text that ends where the answer begins, with one `{}` for the subject.
        subject: what the fact is about.
        target: the answer that the edited model is to give.
        target_true: the answer that it gives now, if known.
        paraphrases: other prompts with the same answer, the subject written out.
        neighbours: prompts about other subjects, whose answers are to stay.

    Raises:
        ValueError: the prompt has no slot or several, or the subject or the target is empty.
    """

    prompt: str
    subject: str
    target: str
    target_true: str = ""
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse requests that say nothing, or not where the subject stands."""
        if (count := self.prompt.count(SLOT)) != 1:
            message = f"The prompt {self.prompt!r} has {count} slots '{SLOT}' for the subject {self.subject!r}; "
            raise ValueError(message + "write one where the subject stands.")
        for name in ("subject", "target"):
            if not getattr(self, name).strip():
                raise ValueError(f"The {name} of the prompt {self.prompt!r} is empty; write the words.")

    @property
    def text(self) -> str:
        """The prompt with the subject in its place."""
        return self.prompt.replace(SLOT, self.subject)

    @property
    def subject_end(self) -> int:
        """The number of characters of `text` up to the end of the subject."""
        return self.prompt.index(SLOT) + len(self.subject.rstrip())


def request_of(prompt: str, subject: str, target: str, **rest: Any) -> EditRequest:
    """A request from a prompt in which the subject is written out, or stands as `{}`.

    Args:
        prompt: see above.
        subject: must stand in the prompt exactly once.
        target: the new answer.
        **rest: the other fields.

    Raises:
        ValueError: the subject is not in the prompt, or is there twice.
    """
    if SLOT not in prompt and subject.strip():
        if (count := prompt.count(subject)) != 1:
            found = "does not occur" if count == 0 else f"occurs {count} times"
            message = f"The subject {subject!r} {found} in the prompt {prompt!r}; "
            raise ValueError(message + f"write '{SLOT}' in the prompt where the subject stands.")
        prompt = prompt.replace(subject, SLOT)
    return EditRequest(prompt, subject, target, **rest)


class Sifted(NamedTuple):
    """The requests of a file, and why other records of it are none.

    Attributes:
        requests: in order.
        refused: a sentence on each other record, with the file and the number of its line or record.
    """

    requests: list[EditRequest]
    refused: tuple[str, ...]


def read_requests(path: str | os.PathLike[str]) -> list[EditRequest]:
    """The requests of a file: a JSON list of records, or one record in each line.

    A record is of CounterFact (`requested_rewrite`), of zsRE (`src`, `alt`), of EasyEdit (`target_new`), or has the
    fields of `EditRequest`. Keys that no edit needs are skipped.

    Raises:
        ValueError: a line is no JSON, or a record is none of these or says something impossible; the message has the
            file and the number of the line or record.
    """
    found = _sifted(Path(path))
    if found.refused:
        raise ValueError(found.refused[0])
    return found.requests


def sift_requests(path: str | os.PathLike[str]) -> Sifted:
    """The requests of a file as `read_requests` reads them, without the records that it refuses.

    Raises:
        ValueError: no record is left, or the file is a list that is no JSON as a whole.
    """
    found = _sifted(Path(path))
    if not found.requests:
        message = f"{path} holds no edit; none of its {len(found.refused)} records is one. "
        raise ValueError(message + found.refused[0])
    return found


def _sifted(path: Path) -> Sifted:
    requests, refused = [], []
    for where, record in _records(path):
        try:
            if isinstance(record, ValueError):
                raise record
            requests.append(_request(record))
        except ValueError as error:
            refused.append(f"{where}{error}")
    if not requests and not refused:
        raise ValueError(f"{path} holds no edit; write one record per line, or a JSON list of them.")
    return Sifted(requests, tuple(refused))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record, or an error where a line is none."""
    content = path.read_text(encoding="utf-8")
    if content.lstrip().startswith("["):
        records = _parsed(content, path, 1)
        yield from ((f"{path}, record {number}: ", record) for number, record in enumerate(records, 1))
        return
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line.strip():
                yield f"{path}, line {number}: ", _parsed(line, path, number)
        except ValueError as error:
            yield "", error


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        message = f"{path}, line {line + error.lineno - 1} is no JSON ({error.msg} at column {error.colno}); "
        raise ValueError(message + "write one record per line, or a JSON list of records.") from error


def _request(record: Any) -> EditRequest:
    if not isinstance(record, Mapping):
        raise ValueError(f"A record must be an object with keys, not {type(record).__name__}.")
    for mark, read in (
        ("requested_rewrite", _counterfact),
        ("src", _zsre),
        ("target_new", _easyedit),
        ("target", _own),
    ):
        if mark in record:
            return read(record)
    message = f"The record has the keys {', '.join(map(repr, record))}, but none of 'requested_rewrite' (CounterFact), "
    raise ValueError(message + "'src' (zsRE), 'target_new' (EasyEdit) or 'target'.")


def _counterfact(record: Mapping[str, Any]) -> EditRequest:
    rewrite = record["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise ValueError("'requested_rewrite' must be an object with 'prompt', 'subject' and 'target_new'.")
    return request_of(
        *(_text(rewrite, key) for key in ("prompt", "subject", "target_new")),
        target_true=_text(rewrite, "target_true", ""),
        paraphrases=_texts(record, "paraphrase_prompts"),
        neighbours=_texts(record, "neighborhood_prompts"),
    )


def _zsre(record: Mapping[str, Any]) -> EditRequest:
    return request_of(
        *(_text(record, key) for key in ("src", "subject", "alt")),
        target_true=_text(record, "answers", ""),
        paraphrases=_texts(record, "rephrase"),
        neighbours=_texts(record, "loc"),
    )


def _easyedit(record: Mapping[str, Any]) -> EditRequest:
    locality = record.get("locality")
    groups = locality.values() if isinstance(locality, Mapping) else ()
    others = [text for group in groups if isinstance(group, Mapping) for text in _texts(group, "prompt")]
    return request_of(
        *(_text(record, key) for key in ("prompt", "subject", "target_new")),
        target_true=_text(record, "ground_truth", ""),
        paraphrases=_texts(record, "rephrase_prompt"),
        neighbours=(*_texts(record, "locality_prompt"), *others),
    )


def _own(record: Mapping[str, Any]) -> EditRequest:
    if unknown := record.keys() - {field.name for field in fields(EditRequest)}:
        message = f"The record has the unknown keys {', '.join(map(repr, sorted(unknown)))}; "
        raise ValueError(message + f"known are {', '.join(field.name for field in fields(EditRequest))}.")
    return request_of(
        *(_text(record, key) for key in ("prompt", "subject", "target")),
        target_true=_text(record, "target_true", ""),
        paraphrases=_texts(record, "paraphrases"),
        neighbours=_texts(record, "neighbours"),
    )


def _text(record: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """A text, also where it is kept as `{"str": text}` or as the first of a list."""
    value = record.get(key, default)
    if isinstance(value, Mapping):
        value = value.get("str")
    if isinstance(value, list):
        value = value[0] if value else default
    if not isinstance(value, str):
        found = "is missing" if value is None else f"is {value!r}"
        raise ValueError(f"The key {key!r} of the record {found}; it must be a text.")
    return value


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """No text, one, or a list of them."""
    value = record.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError(f"The key {key!r} of the record is {value!r}; it must be a text or a list of texts.")
    return tuple(values)
