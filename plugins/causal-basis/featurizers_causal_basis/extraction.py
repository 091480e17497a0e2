"""`extract_causal_bases`: the directions of each layer whose ablation changes the output distribution most."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final, get_args

import torch
from featurizers import Site
from featurizers.errors import ShapeError, UsageError
from featurizers.format import Side
from featurizers.models import Inputs
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featurizers_causal_basis.candidates import quartic_maxima, scores_of, singular_vectors
from featurizers_causal_basis.energy import Energy
from featurizers_causal_basis.featurizer import SITES, CausalBasisFeaturizer
from featurizers_causal_basis.layers import HiddenStates, Layers, WholeModel
from featurizers_causal_basis.presets import Preset, preset_of
from featurizers_causal_basis.progress import Listener, Progress
from featurizers_causal_basis.readouts import Decoder, Readout, hash_of
from featurizers_causal_basis.record import BasisRecord, Mode
from featurizers_causal_basis.reduction import Processes
from featurizers_causal_basis.runs import LayerState, Run
from featurizers_causal_basis.solver import search

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOST_RESTARTS = 2**20
"""A greater number than any preset's; keeps the seeds of steps and layers apart."""


class NoDirectionWarning(UserWarning):
    """A layer none of whose directions has the energy that was asked for, so that it has no basis."""


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
    """A causal basis for each layer of a model.

    A basis is found one vector at a time: v_j is the unit vector orthogonal to those before it whose ablation alone
    changes the output distribution most, by its energy: the mean over tokens of KL(p(h) ‖ p(h - v vᵀ(h - m))), in nats.
    Belrose et al. 2023 (arXiv:2303.08112), section 4.

    Everything is computed in fp32, for float64 activations in float64. Where torch.distributed is initialised, each
    process holds its own tokens, and all find the same bases, of all tokens.

    Args:
        model: what gives the output distribution: a `Readout` such as `LogitLens` or `TunedLens`; a module or function
            from activations to logits; or a whole model of `transformers`, whose own output is then meant.
        inputs: hidden states, one tensor a layer, ``inputs[i]`` of block i (transformers' ``hidden_states``, whose last
            is left out, are those of ``side="input"``). Or token ids, alone or with an attention mask as the model is
            called with them, for a whole model or a lens.
        k: vectors a layer.
        max_iter: iterations of L-BFGS a vector.
        min_energy: nats per token that a vector has at least; the first that has less ends its basis, and is left out.
        mode: what a direction is ablated to: its ``mean`` over tokens, its value in another token (``resample``, one
            derangement for a whole layer), or ``zero``.
        layers: which, all if None.
        mask: which tokens take part. The attention mask unless given, where there is one. The first token of a prompt
            is best left out of most models.
        side: whether the hidden states are the blocks' ``input`` or ``output``.
        preset: ``multi``, ``fast``, ``reference`` or ``reference-axes``; see `featurizers_causal_basis.presets`.
        seed: of everything random.
        group: processes that hold the tokens, all if None.
        progress: called as `Progress` says.
        resume: a folder that finished layers and vectors are written to, and read from if it has some.
        batch_size: prompts that are run together, for token ids.
        mask_rule: the mask in words, for the record.
        model_id: Hub id of the model, for the record.
        model_revision: commit of the model, likewise.

    Returns:
        A basis for each layer, with its site. A layer without any direction of ``min_energy`` has none.

    Raises:
        UsageError: an option is none of those allowed; a folder to resume from is of another extraction.
        ShapeError: activations, mask or token ids do not fit together, or not the readout.

    Warns:
        MassiveTokenWarning: a token that takes part is far longer than the others.
        NoDirectionWarning: a layer has no basis.

    Example:
        >>> decoder = nn.Sequential(nn.RMSNorm(4, eps=1e-6), nn.Linear(4, 10))
        >>> hidden = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
        >>> (basis,) = extract_causal_bases(decoder, [hidden], k=2)
        >>> str(basis.site), basis.n_features
        ('resid.pre:0', 2)
    """
    return list(
        iterate_causal_bases(
            model,
            inputs,
            k,
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
    )


def iterate_causal_bases(
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
) -> Iterator[CausalBasisFeaturizer]:
    """The bases of `extract_causal_bases`, one layer after the other as they are found."""
    for name, number, least in (
        ("k", k, 1),
        ("max_iter", max_iter, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UsageError(f"{name} is a whole number from {least}, not {number!r}")
    if mode not in get_args(Mode) or side not in SITES:
        raise UsageError(
            f"mode is one of {', '.join(get_args(Mode))} and side is input or output, not {mode!r} and {side!r}"
        )
    if not 0 <= min_energy < float("inf"):
        raise UsageError(f"min_energy is a number of nats per token from 0, not {min_energy!r}")
    chosen = preset_of(preset)
    source = _layers(model, inputs, mask, side, batch_size)
    wanted = _wanted(layers, source)
    processes = Processes(group)
    identity = {
        "k": k,
        "max_iter": max_iter,
        "min_energy": min_energy,
        "mode": mode,
        "side": side,
        "preset": preset,
        "solver": chosen.record(),
        "seed": seed,
        "readout": source.readout,
        "readout_sha256": None if resume is None else source.sha256,
        "model": model_id,
        "model_revision": model_revision,
        "processes": processes.size,
    }
    run = Run(None if resume is None else Path(resume).expanduser(), identity, processes)
    run.begin()
    worker = _Extraction(source, k, max_iter, min_energy, mode, chosen, seed, processes, run, progress, len(wanted))
    for done, layer in enumerate(wanted):
        energy, state = worker.layer(layer, done)
        if not len(state.energies):
            warnings.warn(
                f"layer {layer} has no direction of {min_energy} nats per token, and so no basis",
                NoDirectionWarning,
                stacklevel=2,
            )
            continue
        order = state.energies.argsort(descending=True, stable=True)
        record = BasisRecord(
            mode=mode,
            side=side,
            mask=mask_rule or source.mask_rule,
            n_tokens=energy.tokens.n,
            readout=source.readout,
            readout_sha256=source.sha256,
            model=model_id,
            model_revision=model_revision,
            seed=seed,
            preset=preset,
            solver={"max_iter": max_iter, "min_energy": float(min_energy), **chosen.record()},
            evaluations=state.evaluations,
            resamples=1 if mode == "resample" else None,
            steps=tuple(order.tolist()),
            inversions=int((state.energies[1:] > state.energies[:-1]).sum()),
            joint_energy=state.joint_energy,
        )
        like = energy.tokens.h
        yield CausalBasisFeaturizer.of(
            state.vectors[:, order].to(like),
            state.energies[order].to(like),
            energy.tokens.mean.to(like),
            record,
            site=Site(SITES[side], layer, model=model_id, model_revision=model_revision),
        )


@final
class _Extraction:
    """The greedy search at each layer."""

    def __init__(
        self,
        source: Layers,
        k: int,
        max_iter: int,
        min_energy: float,
        mode: Mode,
        preset: Preset,
        seed: int,
        processes: Processes,
        run: Run,
        progress: Listener | None,
        n_layers: int,
    ) -> None:
        self._source, self._k, self._max_iter, self._min_energy = source, k, max_iter, min_energy
        self._mode, self._preset, self._seed, self._processes = mode, preset, seed, processes
        self._run, self._progress, self._n_layers = run, progress, n_layers
        unembedding = source.unembedding if preset.singular and not preset.axes else None
        self._singular = None if unembedding is None else singular_vectors(unembedding)

    def layer(self, layer: int, done: int) -> tuple[Energy, LayerState]:
        """The energy at a layer and its basis, in the order of the search."""
        energy = self._source.energy(layer, self._mode, self._processes, self._seed)
        tokens = energy.tokens
        d = tokens.h.shape[1]
        if self._k > d:
            raise UsageError(f"the activations are {d} wide, so that k is at most {d}, not {self._k}")
        activations = "" if self._run.folder is None else _hash_of_all(self._processes, energy)
        state = self._run.read(layer, activations) or LayerState.empty(d)
        scores: Tensor | None = None
        while not state.finished:
            j = len(state.energies)
            if self._preset.restarts and scores is None:
                scores = scores_of(energy, self._step_seed(layer, MOST_RESTARTS - 1))

            counter = itertools.count(state.evaluations + 1)

            def notify(value: float, j: int = j, counter: Iterator[int] = counter) -> None:
                self._tell(layer, done, j, value, next(counter), found=False)

            starts = self._starts(energy, scores, state, layer)
            found = search(energy, state.vectors, starts, self._preset, self._max_iter, notify)
            value = energy.direct(found.vector.unsqueeze(-1))
            state = self._with(state, found.vector, value, found.losers, found.evaluations)
            self._tell(layer, done, j, value, state.evaluations, found=True)
            if state.finished and len(state.energies):
                state = replace(state, joint_energy=energy.direct(state.vectors))
            self._run.write(layer, activations, state)
        return energy, state

    def _with(
        self, state: LayerState, vector: Tensor, value: float, losers: tuple[Tensor, ...], evaluations: int
    ) -> LayerState:
        """What is known after a step; a vector of too low an energy ends the search, and is left out."""
        evaluations += state.evaluations
        if value < self._min_energy:
            return replace(state, evaluations=evaluations, finished=True)
        kept = losers[: self._preset.losers]
        return LayerState(
            torch.cat([state.vectors, vector.unsqueeze(-1)], dim=1),
            torch.cat([state.energies, torch.tensor([value], dtype=torch.float64)]),
            torch.stack(kept, dim=1) if kept else state.losers[:, :0],
            evaluations,
            finished=len(state.energies) + 1 == self._k,
        )

    def _starts(self, energy: Energy, scores: Tensor | None, state: LayerState, layer: int) -> list[Tensor]:
        """Where the ascents of the next step begin."""
        j, preset = len(state.energies), self._preset
        starts: list[Tensor] = []
        if scores is not None:
            seed = self._step_seed(layer, j)
            starts += quartic_maxima(energy.tokens, scores, state.vectors, preset.restarts, preset.picked, seed)
        if preset.singular or preset.axes:
            axis = torch.eye(len(state.vectors), dtype=torch.float64)[:, j]
            starts.append(axis if self._singular is None else self._singular[:, j])
        return starts + list(state.losers.unbind(dim=1))

    def _step_seed(self, layer: int, step: int) -> int:
        return ((self._seed * 2**12 + layer) * MOST_RESTARTS + step) & (2**63 - 1)

    def _tell(self, layer: int, done: int, vector: int, energy: float, evaluations: int, *, found: bool) -> None:
        if self._progress is not None:
            self._progress(Progress(layer, done, self._n_layers, vector, self._k, energy, evaluations, found))


def _layers(model: Any, inputs: Any, mask: Tensor | None, side: Side, batch_size: int) -> Layers:
    """Where the activations come from and what reads them."""
    if isinstance(inputs, Tensor) and not inputs.is_floating_point():
        inputs = {"input_ids": inputs}
    if isinstance(inputs, Tensor):
        raise ShapeError("the activations are a sequence of tensors, one a layer: [h] for one layer")
    if isinstance(inputs, Mapping) and not isinstance(model, Readout):
        if not isinstance(model, nn.Module):
            raise UsageError("token ids are for a model of transformers or a lens; give a decoder the activations")
        return WholeModel(model, inputs, mask, side, batch_size)
    readout = model if isinstance(model, Readout) else Decoder(model)
    return HiddenStates(readout, inputs, mask, side, batch_size)


def _wanted(layers: Iterable[int] | None, source: Layers) -> list[int]:
    """The layers that are wanted, each once."""
    if layers is None:
        return list(source.numbers)
    wanted = list(layers)
    allowed = set(source.numbers)
    if not wanted or len(set(wanted)) != len(wanted) or not allowed.issuperset(wanted):
        raise UsageError(f"layers are among 0 to {len(allowed) - 1}, each once, not {wanted}")
    return wanted


def _hash_of_all(processes: Processes, energy: Energy) -> str:
    """Hash of the activations that take part, of all processes, and of what they are ablated to."""
    own = hash_of([energy.tokens.h, energy.tokens.deviation])
    parts = processes.all(own)
    return hash_of([torch.frombuffer(bytearray("".join(parts).encode()), dtype=torch.uint8)])
