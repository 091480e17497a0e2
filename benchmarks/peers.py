"""The peers: pyvene, a rotation under torch's orthogonal parametrization as in pyvene, and TransformerLens."""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
from typing import Any, TypeAlias

import torch
from timing import Skipped
from torch import Tensor, nn

Inputs: TypeAlias = dict[str, Tensor]


def pyvene() -> Any:
    """Import `pyvene`.

    Raises:
        Skipped: it is not installed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its missing extras
            return importlib.import_module("pyvene")
    except ImportError as error:
        raise Skipped(f"the peer, pyvene, cannot be imported: {error}") from error


def pyvene_model(model: nn.Module, layer: int, intervention: str | nn.Module) -> Any:
    """Build a pyvene model with one intervention, an instance or a name in pyvene, on the output of a block."""
    pv = pyvene()
    # without keep_last_dim pyvene concatenates the positions and collects the first d elements only
    made = getattr(pv, intervention)(keep_last_dim=True) if isinstance(intervention, str) else intervention
    with contextlib.redirect_stdout(io.StringIO()):
        intervenable = pv.IntervenableModel(
            {"layer": layer, "component": "block_output", "intervention": made}, model=model
        )
    intervenable.set_device(next(model.parameters()).device)
    return intervenable


class ParametrizedSubspace(nn.Module):
    """Subspace whose basis torch recomputes at each use.

    This is pyvene's `LowRankRotateLayer` under `torch.nn.utils.parametrizations.orthogonal`, as in pyvene's
    `LowRankRotatedSpaceIntervention`, split into a featurizer and its inverse. Each reads ``rotate.weight`` once, and
    each read computes the matrix from its parameters.
    """

    def __init__(self, d_in: int, n_features: int) -> None:
        super().__init__()
        pyvene()
        layers = importlib.import_module("pyvene.models.layers")
        self.rotate = torch.nn.utils.parametrizations.orthogonal(layers.LowRankRotateLayer(d_in, n_features))

    def featurize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates and the part outside the subspace."""
        weight = self.rotate.weight
        x = x.to(weight.dtype)
        features = x @ weight
        return features, x - features @ weight.mT

    def encode(self, x: Tensor) -> Tensor:
        """Return the coordinates alone; the error of a source is not needed, which makes this peer faster."""
        return self.rotate(x)

    def inverse_featurize(self, features: Tensor, error: Tensor) -> Tensor:
        """Return the point with these coordinates and this error."""
        return features @ self.rotate.weight.mT + error

    def interchange(self, base: Tensor, source: Tensor) -> Tensor:
        """Return ``base`` with all coordinates of ``source``; this computes the basis three times."""
        _, error = self.featurize(base)
        return self.inverse_featurize(self.encode(source), error).to(base.dtype)


def rotated(subspace: ParametrizedSubspace) -> Any:
    """Build a pyvene intervention that interchanges a subspace and trains its rotation."""
    pv = pyvene()

    class Rotated(pv.TrainableIntervention, pv.DistributedRepresentationIntervention):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(keep_last_dim=True)
            self.subspace = subspace

        def forward(self, base: Tensor, source: Tensor, subspaces: object = None) -> Tensor:
            return self.subspace.interchange(base, source)

    return Rotated()


def masked(d_in: int) -> Any:
    """Build a pyvene intervention that moves neurons to the source by trained gates, sigmoid(logit / temperature)."""
    pv = pyvene()

    class Masked(pv.TrainableIntervention):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(keep_last_dim=True)
            self.mask = nn.Parameter(torch.zeros(d_in))
            self.temperature = torch.tensor(1.0)

        def forward(self, base: Tensor, source: Tensor, subspaces: object = None) -> Tensor:
            gate = torch.sigmoid(self.mask / self.temperature) if self.training else (self.mask > 0).to(base.dtype)
            return (1.0 - gate) * base + gate * source

    return Masked()


class Trainer:
    """Trains a pyvene intervention as the public recipes do (CausalAbstraction, pyvene's tutorials).

    Each step runs both prompts through the whole model. The optimizer is AdamW without weight decay, the loss
    cross-entropy at the last token, and the model is frozen. Prompts are token ids, padded on the left.

    Args:
        model: a decoder.
        layer: the block whose output is edited, at the last token.
        intervention: the intervention to train.
        last_only: compute the logits of the last token only, which the recipes do not.
    """

    def __init__(self, model: nn.Module, layer: int, intervention: Any, *, last_only: bool = False) -> None:
        self.intervenable = pyvene_model(model, layer, intervention)
        self.intervenable.disable_model_gradients()
        self.intervention = intervention
        self.extra = {"logits_to_keep": 1} if last_only else {}

    def logits(self, base: Inputs, source: Inputs) -> Tensor:
        """Return the logits of the last token after the interchange."""
        batch, length = base["input_ids"].shape
        units = [[[[at]] * batch] for at in (source["input_ids"].shape[1] - 1, length - 1)]
        sides = {**base, **self.extra}, [{**source, **self.extra}]
        locations = {"sources->base": tuple(units)}
        _, patched = self.intervenable(*sides, unit_locations=locations, use_cache=False)
        logits: Tensor = patched.logits[:, -1]
        return logits

    def step(self, base: Inputs, source: Inputs, label: Tensor, optimizer: torch.optim.Optimizer) -> float:
        """Make one optimizer step; return the loss."""
        loss = nn.functional.cross_entropy(self.logits(base, source), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()


def transformer_bridge(model: Any) -> Any:
    """Return a TransformerBridge of a copy of a model, which is written to a folder with a small tokenizer.

    Raises:
        Skipped: TransformerLens is not installed.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise Skipped(f"TransformerLens cannot be imported: {error}") from error
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(8)}, unk_token="w0"))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device=str(model.device), dtype=model.dtype)
    return bridge.requires_grad_(False)
