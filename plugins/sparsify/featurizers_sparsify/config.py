"""``cfg.json`` of sparsify, and what the name of a hookpoint says."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
ROOT = "config.json"
"""Configuration of the training, at the top of a repository."""
MODULES = {"mlp": "mlp.out", "self_attn": "attn.out", "attn": "attn.out", "attention": "attn.out"}
"""Site of each module of a block whose output is a site, by its name in a hookpoint."""
DECODERS = "model|transformer|gpt_neox|decoder|language_model"
"""Names of modules that may stand before the blocks in a hookpoint; blocks of an image tower are not sites."""
BLOCK = re.compile(rf"(?:(?:{DECODERS})\.)*(?:layers|h)\.(\d{{1,5}})(?:\.(\w+))?")


class SparsifyConfig(BaseModel):
    """Contents of ``cfg.json``.

    Attributes:
        d_in: width of the activations.
        activation: ``topk`` or ``groupmax``.
        expansion_factor: features for each coordinate, if ``num_latents`` is 0.
        normalize_decoder: True if decoder rows were kept at length 1 in training; reading ignores it.
        num_latents: number of features, 0 for ``d_in * expansion_factor``.
        k: number of features of a token that may fire.
        multi_topk: True if training used that loss; reading ignores it.
        skip_connection: True if the input is added to the output through a matrix, as transcoders do.
        transcode: True if a module's output is predicted from its input. Transcoders of before February 2025 lack it.
        signed: option of versions before 1.0: if True the k largest magnitudes fire, with their sign.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    d_in: int = Field(gt=0, le=2**24)
    activation: str = "topk"
    expansion_factor: int = Field(32, gt=0)
    normalize_decoder: bool = True
    num_latents: int = Field(0, ge=0)
    k: int = Field(32, gt=0)
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False
    signed: bool = False
