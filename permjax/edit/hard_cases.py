"""Edits that break models most easily, found among others: the subject is one token and begins the prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from permjax.edit.requests import SLOT, EditRequest
from permjax.io.tokenizers import Tokenizer


class HardCases(NamedTuple):
    """Hard edits, and for each one a control of the same size whose subject stands later."""

    hard: list[EditRequest]
    controls: list[EditRequest]


def is_hard(request: EditRequest, tokenizer: Tokenizer) -> bool:
    """Whether the prompt begins with the subject, and the subject is one token there."""
    if not request.prompt.startswith(SLOT):
        return False
    inside = [
        last for first, last in tokenizer.encode(request.text).offsets if first < request.subject_end and last > 0
    ]
    return len(inside) == 1


def mine_hard_cases(requests: Sequence[EditRequest], tokenizer: Tokenizer) -> HardCases:
    """Find the hard edits among some, and match them with controls.

    Controls are edits with words before their subject. Each is used once, and together they differ as little as
    possible from the hard edits in the numbers of tokens of prompt and target.

    Args:
        requests: such as `read_requests` gives them.
        tokenizer: that of the model.

    Returns:
        The hard edits in their order, as many as there are controls for, and the control of each.

    Raises:
        ValueError: there is no hard edit, or no control.

    Source:
        Yang et al., "The Butterfly Effect of Model Editing", Findings of ACL 2024, on what hard cases have in common.
    """
    hard = [request for request in requests if is_hard(request, tokenizer)]
    later = [request for request in requests if not request.prompt.startswith(SLOT)]
    if not hard or not later:
        found = f"{len(hard)} edits with a subject of one token at the start, and {len(later)} with one further behind"
        raise ValueError(f"Of {len(requests)} edits there are {found}; give some of both.")
    sizes = [np.array([_size(request, tokenizer) for request in some]) for some in (hard, later)]
    costs = np.abs(sizes[0][:, None] - sizes[1][None]).sum(axis=-1)
    pairs = zip(*linear_sum_assignment(costs), strict=True)
    matched = [(hard[i], later[j]) for i, j in pairs]
    return HardCases([one for one, _ in matched], [other for _, other in matched])


def _size(request: EditRequest, tokenizer: Tokenizer) -> tuple[int, int]:
    """The numbers of tokens of prompt and target."""
    return len(tokenizer.encode(request.text).ids), len(tokenizer.encode(request.target).ids)
