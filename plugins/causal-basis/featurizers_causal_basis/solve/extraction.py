"""`extract_causal_bases`: the directions of each layer whose ablation changes the output distribution most."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, final

import torch
from featurizers import Site
from featurizers.errors import ShapeError, UsageError
from featurizers.format import Side, fingerprint
from featurizers.models import Inputs
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featurizers_causal_basis.featurizer import SITES, CausalBasisFeaturizer
from featurizers_causal_basis.lens import Decoder, Readout
from featurizers_causal_basis.record import BasisRecord, Mode
from featurizers_causal_basis.solve.candidates import quartic_maxima, scores_of, singular_vectors
from featurizers_causal_basis.solve.energy import Energy
from featurizers_causal_basis.solve.layers import HiddenStates, Layers, WholeModel
from featurizers_causal_basis.solve.options import ExtractionOptions, Listener, Progress
from featurizers_causal_basis.solve.processes import Processes
from featurizers_causal_basis.solve.runs import LayerState, Run
from featurizers_causal_basis.solve.solver import PRESETS, SearchResult, search

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOST_RESTARTS = 2**20
"""Greater than the restarts of any preset; keeps the seeds of steps and layers apart."""

P = ParamSpec("P")
T = TypeVar("T")


class NoDirectionWarning(UserWarning):
    """No direction of a layer has the required energy, so the layer has no basis."""


def extract_causal_bases(
    model: Readout | nn.Module | Callable[[Tensor], Tensor],
    inputs: Sequence[Float[Tensor, "*tokens d"]] | Int[Tensor, "batch sequence"] | Inputs,
    k: int,
    *,
    max_iter: int = 100,
    min_energy: float = 0.0,
    mode: Mode = "mean",
    layers: Iterable[int] | None = None,
    mask: Bool[Tensor, "*tokens"] | Int[Tensor, "*tokens"] | None = None,
    side: Side = "input",
    preset: str = "multi",
    seed: int = 0,
    group: ProcessGroup | None = None,
    progress: Listener | None = None,
    resume: str | Path | None = None,
    batch_size: int = 8,
    mask_rule: str | None = None,
    model_id: str | None = None,
    model_revision: str | None = None,
) -> list[CausalBasisFeaturizer]:
    """Find a causal basis for each layer of a model.

    A basis is found one vector at a time: v_j is the unit vector orthogonal to those before it whose ablation alone
    changes the output distribution most, by its energy: the mean over tokens of KL(p(h) ‖ p(h - v vᵀ(h - m))), in nats.
    Belrose et al. 2023 (arXiv:2303.08112), section 4.

    Everything is computed in fp32, for float64 activations in float64. Where torch.distributed is initialised, each
    process holds its own tokens, and all find the same bases, of all tokens.

    Args:
        model: gives the output distribution: a `Readout` such as `LogitLens` or `TunedLens`; a module or function from
            activations to logits; or a whole model of `transformers`, for its own output.
        inputs: hidden states, one tensor per layer, ``inputs[i]`` of block i. The ``hidden_states`` of transformers
            fit ``side="input"``; their last entry is ignored. Or token ids for a whole model or a lens, alone or in a
            mapping of the model's inputs.
        k: vectors per layer.
        max_iter: iterations of L-BFGS per vector.
        min_energy: least energy of a vector, nats per token. The first vector with less ends its basis and is dropped.
        mode: ablation sets a direction to its ``mean`` over tokens, to its value in another token (``resample``, with
            one derangement per layer), or to ``zero``.
        layers: indices of layers; None for all.
        mask: selects the tokens to use; the attention mask by default. In most models the first token of a prompt is
            best left out.
        side: whether the hidden states are the blocks' ``input`` or ``output``.
        preset: ``multi``, ``fast``, ``reference`` or ``reference-axes``; see `featurizers_causal_basis.PRESETS`.
        seed: of everything random.
        group: processes that share the tokens; None for all.
        progress: receives a `Progress` after each evaluation.
        resume: folder that keeps finished layers and vectors, to continue from after an interruption.
        batch_size: prompts per forward pass, for token ids.
        mask_rule: the mask in words, for the record.
        model_id: Hub id of the model, for the record.
        model_revision: commit of the model, for the record.

    Returns:
        A basis for each layer, with its site. A layer without a direction of ``min_energy`` has none.

    Raises:
        UsageError: an option is out of range; the folder to resume from belongs to another extraction.
        ShapeError: activations, mask, token ids and readout do not fit together.

    Warns:
        MassiveTokenWarning: a selected token is far longer than the others.
        NoDirectionWarning: a layer has no basis.

    Examples:
        >>> decoder = nn.Sequential(nn.RMSNorm(4, eps=1e-6), nn.Linear(4, 10))
        >>> hidden = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
        >>> (basis,) = extract_causal_bases(decoder, [hidden], k=2)
        >>> str(basis.site), basis.n_features
        ('resid.pre:0', 2)
    """
    options = ExtractionOptions(
        k=k,
        max_iter=max_iter,
        min_energy=min_energy,
        mode=mode,
        layers=layers,
        mask=mask,
        side=side,
        preset=preset,
        seed=seed,
        group=group,
        progress=progress,
        resume=resume,
        batch_size=batch_size,
        mask_rule=mask_rule,
        model_id=model_id,
        model_revision=model_revision,
    )
    return list(_bases(model, inputs, options))


def _with_arguments_of(_: Callable[P, object]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """Declare that a function takes the arguments of another one, for type checkers."""
    return lambda function: function


@_with_arguments_of(extract_causal_bases)
def iterate_causal_bases(model: Any, inputs: Any, k: int, **options: Any) -> Iterator[CausalBasisFeaturizer]:
    """Yield the bases of `extract_causal_bases`, which describes the arguments, as each layer is finished."""
    yield from _bases(model, inputs, ExtractionOptions(k=k, **options))


def _bases(model: Any, inputs: Any, options: ExtractionOptions) -> Iterator[CausalBasisFeaturizer]:
    source = _source(model, inputs, options)
    numbers = _checked_layers(options.layers, source.count)
    with closing(_Extraction(source, options, len(numbers))) as extraction:
        for done, layer in enumerate(numbers):
            energy, state = extraction.layer(layer, done)
            if len(state.energies):
                yield _basis(source, options, layer, energy, state)
            else:
                warnings.warn(
                    f"layer {layer} has no direction of {options.min_energy} nats per token, and so no basis",
                    NoDirectionWarning,
                    stacklevel=3,
                )


def _source(model: Any, inputs: Any, options: ExtractionOptions) -> Layers:
    """Return the source of the activations of each layer, together with their readout."""
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        inputs = {"input_ids": inputs}
    if isinstance(inputs, Tensor):
        raise ShapeError("the activations are a sequence of tensors, one per layer: [h] for one layer")
    if isinstance(inputs, Mapping) and not isinstance(model, Readout):
        if not isinstance(model, nn.Module):
            raise UsageError("token ids are for a model of transformers or a lens; give a decoder the activations")
        return WholeModel(model, inputs, options)
    readout = model if isinstance(model, Readout) else Decoder(model)
    return HiddenStates(readout, inputs, options)


def _checked_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    """Return the chosen layers, all if None."""
    numbers = list(range(count) if layers is None else layers)
    if not numbers or len(set(numbers)) != len(numbers) or not set(range(count)).issuperset(numbers):
        raise UsageError(f"layers are distinct numbers from 0 to {count - 1}, not {numbers}")
    return numbers


def _basis(
    source: Layers, options: ExtractionOptions, layer: int, energy: Energy, state: LayerState
) -> CausalBasisFeaturizer:
    """Return the featurizer of a finished layer, its vectors sorted by energy."""
    order = state.energies.argsort(descending=True, stable=True)
    record = BasisRecord(
        mode=options.mode,
        side=options.side,
        mask=options.mask_rule or source.mask_rule,
        n_tokens=energy.tokens.n,
        readout=source.readout,
        readout_sha256=source.sha256,
        model=options.model_id,
        model_revision=options.model_revision,
        seed=options.seed,
        preset=options.preset,
        solver={
            "max_iter": options.max_iter,
            "min_energy": float(options.min_energy),
            **options.schedule.record(),
        },
        evaluations=state.evaluations,
        resamples=1 if options.mode == "resample" else None,
        steps=tuple(order.tolist()),
        inversions=int((state.energies[1:] > state.energies[:-1]).sum()),
        joint_energy=state.joint_energy,
    )
    like = energy.tokens.h
    return CausalBasisFeaturizer.of(
        state.vectors[:, order].to(like),
        state.energies[order].to(like),
        energy.tokens.mean.to(like),
        record,
        site=Site(SITES[options.side], layer, model=options.model_id, model_revision=options.model_revision),
    )


@final
class _Extraction:
    """Greedy search at each of ``n_layers`` layers."""

    def __init__(self, source: Layers, options: ExtractionOptions, n_layers: int) -> None:
        self._source, self._options, self._n_layers = source, options, n_layers
        self._preset, self._processes = options.schedule, Processes(options.group)
        self._run: Run | None = None  # of process 0 alone
        unembedding = source.unembedding if self._preset.singular and not self._preset.axes else None
        self._singular = None if unembedding is None else singular_vectors(unembedding)
        if options.resume is not None:
            self._processes.on_first(self._open_run)

    def close(self) -> None:
        """Release the folder of the run."""
        if self._run is not None:
            self._run.close()

    def layer(self, layer: int, done: int) -> tuple[Energy, LayerState]:
        """Return the energy at a layer and its basis in the order of the search, after ``done`` other layers."""
        energy = self._source.energy(layer, self._processes)
        d = energy.tokens.h.shape[1]
        if self._options.k > d:
            raise UsageError(f"the activations are {d} wide, so that k is at most {d}, not {self._options.k}")
        state, activations, scores = LayerState.empty(d), "", None
        if self._options.resume is not None:
            activations = self._hash_of_tokens(energy)
            k, losers = self._options.k, self._preset.losers
            state = (
                self._processes.on_first(lambda: self._run and self._run.read(layer, activations, d, k, losers))
                or state
            )
        while not state.finished:
            if self._preset.restarts and scores is None:
                scores = scores_of(energy, self._step_seed(layer, MOST_RESTARTS - 1))
            state = self._step(energy, scores, state, layer, done)
            if self._run is not None:
                self._run.write(layer, activations, state)
        return energy, state

    def _step(self, energy: Energy, scores: Tensor | None, state: LayerState, layer: int, done: int) -> LayerState:
        """Search for the next vector and return the new state."""
        vector, counter = len(state.energies), itertools.count(state.evaluations + 1)

        def tell(value: float, evaluations: int, *, found: bool) -> None:
            if (listener := self._options.progress) is not None:
                k = self._options.k
                listener(Progress(layer, done, self._n_layers, vector, k, value, evaluations, found))

        def notify(value: float) -> None:
            tell(value, next(counter), found=False)

        starts = self._starts(energy, scores, state, layer)
        result = search(energy, state.vectors, starts, self._preset, self._options.max_iter, notify)
        for preset, start in self._published(len(state.vectors), vector):
            other = search(energy, state.vectors, [start], PRESETS[preset], self._options.max_iter, notify)
            result = result.or_better(other, energy)
        value = energy.direct(result.column)
        state = self._with(state, result, value)
        tell(value, state.evaluations, found=True)
        if state.finished and len(state.energies):
            state = replace(state, joint_energy=energy.direct(state.vectors))
        return state

    def _with(self, state: LayerState, result: SearchResult, value: float) -> LayerState:
        """Return the state after a search. A vector with too low an energy is dropped and ends the basis."""
        evaluations = state.evaluations + result.evaluations
        if value < self._options.min_energy:
            return replace(state, evaluations=evaluations, finished=True)
        losers = result.losers[: self._preset.losers]
        return LayerState(
            torch.cat([state.vectors, result.vector.unsqueeze(-1)], dim=1),
            torch.cat([state.energies, torch.tensor([value], dtype=torch.float64)]),
            torch.stack(losers, dim=1) if losers else state.losers[:, :0],
            evaluations,
            finished=len(state.energies) + 1 == self._options.k,
        )

    def _starts(self, energy: Energy, scores: Tensor | None, state: LayerState, layer: int) -> list[Tensor]:
        """Return the start directions of the next search."""
        j, preset = len(state.energies), self._preset
        starts: list[Tensor] = []
        if scores is not None:
            seed = self._step_seed(layer, j)
            starts += quartic_maxima(energy.tokens, scores, state.vectors, preset.restarts, preset.picked, seed)
        if preset.singular or preset.axes:
            starts.append(self._directions(len(state.vectors))[:, j])
        return starts + list(state.losers.unbind(dim=1))

    def _published(self, d: int, vector: int) -> list[tuple[str, Tensor]]:
        """Return the published presets with their first starts, if the preset runs them for this vector.

        Where both start at the first unit axis, ``reference`` ascends as ``reference-axes`` does, and further.
        """
        if not self._preset.published or vector > 0:
            return []
        axis, own = torch.eye(d, dtype=torch.float64)[:, 0], self._directions(d)[:, 0]
        both = [("reference", own), ("reference-axes", axis)]
        return both[:1] if torch.equal(axis, own) else both

    def _directions(self, d: int) -> Float[Tensor, "d d"]:
        """Return the singular vectors of the unembedding; unit axes if it is unknown, or reads a hidden layer."""
        if self._singular is None or len(self._singular) != d:
            return torch.eye(d, dtype=torch.float64)
        return self._singular

    def _step_seed(self, layer: int, step: int) -> int:
        return ((self._options.seed * 2**12 + layer) * MOST_RESTARTS + step) & (2**63 - 1)

    def _open_run(self) -> None:
        options = self._options
        named = ("k", "max_iter", "min_energy", "mode", "side", "preset", "seed", "model_revision")
        identity = {
            **{name: getattr(options, name) for name in named},
            "model": options.model_id,
            "solver": self._preset.record(),
            "readout": self._source.readout,
            "readout_sha256": self._source.sha256,
            "processes": self._processes.size,
        }
        self._run = Run(Path(options.resume).expanduser(), identity)  # type: ignore[arg-type]  # it is not None

    def _hash_of_tokens(self, energy: Energy) -> str:
        """Return a hash of the activations of all processes and of their deviations."""
        parts = self._processes.all(fingerprint([energy.tokens.h, energy.tokens.deviation]))
        return fingerprint([torch.frombuffer(bytearray("".join(parts).encode()), dtype=torch.uint8)])
