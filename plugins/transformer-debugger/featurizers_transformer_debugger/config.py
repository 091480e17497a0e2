"""transformer-debugger's configuration of scalar derivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
from featurizers.errors import UsageError
from featurizers_derived_scalars import Circuit, Node, RawActivations
from torch import nn

from featurizers_transformer_debugger.names import NamedScalar, PassType

_INSTEAD: Final = {
    "inference_engine_type": "leave it out: the model that was captured is used, whichever it is",
    "autoencoder_config": "give featurizers={kind of place: {layer: featurizer}}",
    "autoencoder_context": "give featurizers={kind of place: {layer: featurizer}}",
    "multi_autoencoder_context": "give featurizers={kind of place: {layer: featurizer}}",
    "trace_config": "give node=Node(basis, layer, index), and the same node as the metric of capture",
    "node_index_for_attention_write": "give node=Node(basis, layer, index)",
    "node_index_for_attribution": "give node=Node(basis, layer, index)",
    "activation_index_for_fake_grad": "give node=Node(basis, layer, index)",
}


@final
@dataclass(frozen=True, kw_only=True)
class DstConfig:
    """Options of derivers; a name that lacks an option raises an error that names it.

    Attributes:
        derive_gradients: offer the backward pass too, where there is one.
        model_name: name of the model, for the caller's own records: weights are those of the model that was captured.
        layer_indices: layers of the results; None for all.
        model_context: circuit of the model; a store of another model is refused.
        device_for_raw_activations: device of the captured tensors; a store on another device is refused.
        detach_layer_norm_scale_for_attribution: whether edges hold norms at their scales. They always do.
        featurizers: featurizers by kind of place, instead of a registry of autoencoders.
        node: for names of traced nodes and edges.
        latent: for names of one feature.
        inference_engine_type: None, as are all below: transformer-debugger's other options, which are not taken.

    Raises:
        UsageError: an option is given that is not taken; the message says what to give.
    """

    derive_gradients: bool = False
    model_name: str | None = None
    layer_indices: Sequence[int] | None = None
    model_context: Circuit | None = None
    device_for_raw_activations: torch.device | None = None
    detach_layer_norm_scale_for_attribution: bool = True
    featurizers: Mapping[str, Any] = field(default_factory=dict)
    node: Node | None = None
    latent: int | None = None

    inference_engine_type: Any = None
    autoencoder_config: Any = None
    autoencoder_context: Any = None
    multi_autoencoder_context: Any = None
    trace_config: Any = None
    node_index_for_attention_write: Any = None
    node_index_for_attribution: Any = None
    activation_index_for_fake_grad: Any = None

    def __post_init__(self) -> None:
        """Refuse what is not taken."""
        for option, instead in _INSTEAD.items():
            if getattr(self, option) is not None:
                raise UsageError(f"DstConfig does not take {option}; {instead}")
        if not self.detach_layer_norm_scale_for_attribution:
            raise UsageError(
                "edges hold norms at their scales: detach_layer_norm_scale_for_attribution=False is not there"
            )
        if self.model_context is not None and not isinstance(self.model_context, Circuit):
            raise UsageError(
                f"model_context is a featurizers_derived_scalars.Circuit of the model, not a "
                f"{type(self.model_context).__name__}"
            )

    def get_device(self) -> torch.device:
        """Return the device of the circuit's model, or that for raw activations, or an accelerator, or the CPU."""
        if self.model_context is not None:
            return next(self.model_context.model.parameters()).device
        if self.device_for_raw_activations is not None:
            return torch.device(self.device_for_raw_activations)
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    def get_model_context(self) -> Circuit:
        """Return the circuit.

        Raises:
            UsageError: there is none.
        """
        if self.model_context is None:
            raise UsageError("this configuration has no model; give model_context=Circuit(model)")
        return self.model_context

    def get_n_layers(self) -> int:
        """Return the number of layers of the circuit's model.

        Raises:
            UsageError: there is no circuit.
        """
        return self.get_model_context().n_layers

    def get_or_create_model(self) -> nn.Module:
        """Return the circuit's model.

        Raises:
            UsageError: there is no circuit.
        """
        return self.get_model_context().model

    def requires_grad_for_type(self, dst: NamedScalar) -> bool:
        """Return True if one of the passes that are asked for needs gradients."""
        passes = tuple(PassType) if self.derive_gradients else (PassType.FORWARD,)
        return any(dst.requires_grad_for_pass_type(pass_type) for pass_type in passes)

    def check(self, raw: RawActivations) -> None:
        """Check that captured tensors are of this model and on this device.

        Raises:
            UsageError: they are not.
        """
        if self.model_context is not None and self.model_context.model is not raw.circuit.model:
            raise UsageError("the store is of another model than model_context; capture with this circuit")
        device = self.device_for_raw_activations
        there = next((x.device for x in raw.values()), None)
        if device is not None and there is not None and torch.device(device).type != there.type:
            raise UsageError(
                f"the store is on {there}, and device_for_raw_activations is {device}; "
                f"capture with device={str(device)!r}"
            )
