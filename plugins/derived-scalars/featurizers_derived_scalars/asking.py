"""What the options of ``featurizers scalars`` say: tokens, layers, nodes, featurizers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import featurizers
import torch
from featurizers.errors import UsageError, shown

from featurizers_derived_scalars.bases import Basis
from featurizers_derived_scalars.entry import grouped
from featurizers_derived_scalars.nodes import Node
from featurizers_derived_scalars.places import KINDS, Place


def prompt_ids(tokenizer: Any, prompt: str, model: Any) -> list[int]:
    """The prompt's token ids, with the special tokens that the tokenizer puts there.

    Raises:
        UsageError: there are none, or more than the model has positions.
    """
    ids: list[int] = tokenizer(prompt)["input_ids"]
    most = getattr(model.config, "max_position_embeddings", None)
    if not ids:
        raise UsageError("the prompt has no tokens; give --prompt some text")
    if isinstance(most, int) and len(ids) > most:
        raise UsageError(f"the prompt has {len(ids)} tokens, and the model takes {most}; shorten it")
    return ids


def one_token(tokenizer: Any, text: str, option: str) -> int:
    """The id of a text that is one token.

    Raises:
        UsageError: it is none or several; the message shows them.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids[:8])
        what = f"is {len(ids)} tokens ({pieces})" if ids else "is no token"
        raise UsageError(
            f"{option} {shown(text)} {what}; give one token, with the space before it if it is a word within a text"
        )
    return int(ids[0])


def load_featurizers(texts: Sequence[str], device: torch.device | str | None) -> dict[str, Any]:
    """Featurizers by kind of place, from ``SITE=SOURCE``, or from sources that say their own site.

    Raises:
        UsageError: one does not say its site, or two are at one.
        SiteError: a site is no place.
        FeaturizerError: a source cannot be loaded.
    """
    found: list[tuple[Any, Any]] = []
    for text in texts:
        site, equals, source = text.partition("=")
        if equals and site.split(":")[0] in KINDS:
            found.append((Place.parse(site), featurizers.load(source, device=device)))
            continue
        if equals and re.fullmatch(r"[a-z.]+(:\d+)?", site):
            Place.parse(site)  # which says that there is no such place
        loaded = featurizers.load(text, device=device)
        if loaded.site is None:
            raise UsageError(f"{text!r} does not say where it belongs; give --featurizer mlp.delta:3={text}")
        found.append((loaded.site, loaded))
    together: dict[str, Any] = {}
    for where, one in found:
        for kind, given in grouped({where: one}).items():
            layers = given if isinstance(given, Mapping) else {None: given}
            if twice := together.get(kind, {}).keys() & layers.keys():
                raise UsageError(f"two featurizers are at {kind}:{next(iter(twice))}; give one")
            together.setdefault(kind, {}).update(layers)
    return {kind: layers.get(None, layers) for kind, layers in together.items()}


def parse_node(text: str, by_kind: Mapping[str, Any]) -> Node:
    """The node of ``KIND:LAYER@INDEX,…``, such as ``mlp.neurons:3@4,17`` or ``attn.probs:2@5,1,0``.

    Where there is a featurizer the last index is a feature's.

    Raises:
        UsageError: it is not like that, or the indices do not fit.
        SiteError: there is no such place.
    """
    where, at, index = text.partition("@")
    if not at or not re.fullmatch(r"-?\d{1,9}(,-?\d{1,9})*", index):
        raise UsageError(
            f"a node is a place, and an index on each of its axes, such as mlp.neurons:3@4,17 (token 4, neuron 17) or "
            f"attn.probs:2@5,1,0 (token 5, key 1, head 0), not {text!r}"
        )
    place = Place.parse(where)
    given = by_kind.get(place.kind)
    if isinstance(given, Mapping) and place.layer not in given:
        given = None
    return Node(Basis(place.kind, given), place.layer, tuple(map(int, index.split(","))))
