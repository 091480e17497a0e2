"""Parsers of the options of ``featurizers scalars``: tokens, nodes and featurizers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import featurizers
import torch
from featurizers.errors import UsageError, shown
from featurizers.models import text_ids

from featurizers_derived_scalars.api import ByKind, grouped_rows
from featurizers_derived_scalars.circuit import KINDS, Place
from featurizers_derived_scalars.nodes import Basis, Node


def prompt_ids(tokenizer: Any, prompt: str, model: Any) -> list[int]:
    """Return the prompt's token ids, with the special tokens that the tokenizer puts before it.

    Raises:
        UsageError: there are none, or more than the model has positions.
    """
    ids, _ = text_ids(tokenizer, prompt)
    most = getattr(model.config, "max_position_embeddings", None)
    if not ids:
        raise UsageError("the prompt has no tokens; give --prompt some text")
    if isinstance(most, int) and len(ids) > most:
        raise UsageError(f"the prompt has {len(ids)} tokens, and the model takes {most}; shorten it")
    return ids


def one_token(tokenizer: Any, text: str, option: str) -> int:
    """Return the id of a text that is one token.

    Raises:
        UsageError: it is no token, or several; the message shows them.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids[:8])
        what = f"is {len(ids)} tokens ({pieces})" if ids else "is no token"
        raise UsageError(
            f"{option} {shown(text)} {what}; give one token, with the space before it if it is a word within a text"
        )
    return int(ids[0])


def load_featurizers(texts: Sequence[str], device: torch.device | str | None) -> ByKind:
    """Load featurizers, and return them by kind of place.

    Args:
        texts: each ``SITE=SOURCE``, or a source that says its own site.
        device: where to load them.

    Raises:
        UsageError: a source does not say its site, or two are at one site.
        SiteError: a site is no place.
        FeaturizerError: a source cannot be loaded.
    """
    return grouped_rows([_load(text, device) for text in texts])


def _load(text: str, device: torch.device | str | None) -> tuple[Any, Any]:
    site, equals, source = text.partition("=")
    if equals and (site.split(":")[0] in KINDS or re.fullmatch(r"[a-z.]+(:\d+)?", site)):
        return Place.parse(site), featurizers.load(source, device=device)
    loaded = featurizers.load(text, device=device)
    if loaded.site is None:
        raise UsageError(f"{text!r} does not say where it belongs; give --featurizer mlp.delta:3={text}")
    return loaded.site, loaded


def parse_node(text: str, by_kind: ByKind) -> Node:
    """Return the node of ``KIND:LAYER@INDEX,…``, such as ``mlp.neurons:3@4,17`` or ``attn.probs:2@5,1,0``.

    If the place has a featurizer, the last index is a feature's.

    Raises:
        UsageError: the text has another form, or the indices do not fit.
        SiteError: there is no such place.
    """
    place_text, at, index = text.partition("@")
    if not at or not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", index):
        raise UsageError(
            f"a node is a place, and an index on each of its axes, such as mlp.neurons:3@4,17 (token 4, neuron 17) or "
            f"attn.probs:2@5,1,0 (token 5, key 1, head 0), not {text!r}"
        )
    place = Place.parse(place_text)
    featurizer = by_kind.get(place.kind)
    if isinstance(featurizer, Mapping) and place.layer not in featurizer:
        featurizer = None
    return Node(Basis(place.kind, featurizer), place.layer, tuple(map(int, index.split(","))))
