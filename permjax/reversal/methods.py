"""Methods of training against the reversal curse as recipes over one loop: what a batch becomes inside the step."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from permjax.reversal.corpus import Corpus, bridged, segmented
from permjax.reversal.denoise import bico, masked_copy, mlm_u
from permjax.reversal.layout import Batch, next_token
from permjax.reversal.reorder import ORDERS, permute_units
from permjax.reversal.rules import RuleSegmenter
from permjax.reversal.segment import Segmenter
from permjax.reversal.transforms import RECIPES, Recipe, with_units
from permjax.reversal.vocabulary import WORD_TOKENS, Special, mask_of

Form = Literal["causal", "masked", "copy"]
"""How a model is asked: to go on, to fill masks that it sees from both sides, or to copy a text with masks."""


class Method(NamedTuple):
    """A method of training.

    Attributes:
        objective: `next_token` after a permutation, or `mlm_u`, `bico` or `masked_copy`.
        recipe: the units and the probabilities of orders.
        cut: which segmenter cuts the units (`rules`, `assistant` or `lm`); those of the corpus by default.
        bridge: whether identity bridges are added to the texts.
    """

    objective: Literal["next_token", "mlm_u", "bico", "masked_copy"] = "next_token"
    recipe: Recipe = RECIPES["ntp"]
    cut: str = ""
    bridge: bool = False

    @property
    def form(self) -> Form:
        """How a model that was trained so is asked."""
        forms: dict[str, Form] = {"mlm_u": "masked", "masked_copy": "copy"}
        return forms.get(self.objective, "causal")


_PERMUTED = ("ntp", "token_permutation", "token_reversal", "ngram2", "ngram3", "unit_reversal", "spt")

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        **{name: Method(recipe=RECIPES[name]) for name in _PERMUTED},
        "random_permutation": Method(recipe=RECIPES["random_permutation"]),
        **{f"spt_{cut}": Method(recipe=RECIPES["spt"], cut=cut) for cut in ("rules", "assistant", "lm")},
        "bico": Method("bico"),
        "mlm_u": Method("mlm_u"),
        "masked_ft": Method("masked_copy"),
        "identity_bridge": Method(bridge=True),
    }
)
"""Methods by name; those that permute are described beside `permjax.reversal.transforms.RECIPES`."""


def corpus_for(method: Method, corpus: Corpus, cutters: Mapping[str, Segmenter] | None = None) -> Corpus:
    """The texts and units that a method is trained on.

    Args:
        method: the method.
        corpus: with units of its own.
        cutters: segmenters by the name that a method gives in `cut`; only `rules` by default.
    """
    found = bridged(corpus) if method.bridge else corpus
    return segmented(found, {"rules": RuleSegmenter(), **(cutters or {})}[method.cut]) if method.cut else found


def prepare(
    method: Method, key: Array, batch: Batch, special: Special = WORD_TOKENS
) -> tuple[dict[str, Any], Int[Array, " 3"]]:
    """What the loss takes of a batch, and how many documents have the original, the reversed and a random order.

    Args:
        method: the method.
        key: of this epoch; what is drawn depends on it and on the example alone.
        batch: rows as `permjax.reversal.layout` has them.
        special: the tags and the mask of the model.

    Raises:
        ValueError: the method hides tokens, and the model has no mask.
    """
    if method.objective == "next_token":
        rows = with_units(key, batch, method.recipe)
        moved = permute_units(key, rows, method.recipe.probs, max_units=batch["tokens"].shape[-1], tag_ids=special.tags)
        return next_token(moved.batch), jnp.stack([(moved.orders == order).sum() for order in range(len(ORDERS))])
    hide = {"mlm_u": mlm_u, "bico": bico, "masked_copy": masked_copy}[method.objective]
    return hide(key, batch, mask_of(special)), jnp.zeros(len(ORDERS), jnp.int32)
