"""Figures of bases and of their fidelity. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featurizers.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from featurizers_causal_basis.featurizer import CausalBasisFeaturizer
    from featurizers_causal_basis.fidelity import Fidelity


def energies_by_layer(bases: Mapping[str, CausalBasisFeaturizer]) -> Figure:
    """Plot the energies of each basis against the number of the vector, in nats per token, on a logarithmic axis.

    Args:
        bases: by label, such as the site.

    Raises:
        UsageError: there is no basis.
        MissingDependencyError: matplotlib is not installed.
    """
    if not bases:
        raise UsageError("there is no basis to draw")
    figure = matplotlib_figure()(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, basis) in enumerate(bases.items()):
        shade = 0.9 * number / max(len(bases) - 1, 1)
        steps = range(1, basis.n_features + 1)
        axes.plot(steps, basis.energies.tolist(), marker="o", markersize=3, label=name, color=_viridis()(shade))
    if all(float(basis.energies[-1]) > 0 for basis in bases.values()):
        axes.set_yscale("log")
        energies = [float(energy) for basis in bases.values() for energy in basis.energies]
        _plain_numbers(axes.yaxis, min(energies), max(energies))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("vector")
    axes.set_ylabel("energy (nats per token)")
    axes.set_title("Energy of ablating one vector", fontsize=10, loc="left")
    axes.legend(fontsize=8, ncols=1 + len(bases) // 12)
    return figure


def fidelity_plot(fidelity: Fidelity) -> Figure:
    """Plot effects on the model against energies by the readout, with the range of the random directions.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    figure = matplotlib_figure()(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(fidelity.energies.tolist(), fidelity.model_kl.tolist(), "o", color=_viridis()(0.3), label="causal basis")
    low, high = float(fidelity.control_kl.min()), float(fidelity.control_kl.max())
    axes.axhspan(low, high, color="0.8", label="random directions")
    if min(low, float(fidelity.model_kl.min()), float(fidelity.energies.min())) > 0:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_numbers(axes.xaxis, float(fidelity.energies.min()), float(fidelity.energies.max()))
        _plain_numbers(axes.yaxis, low, max(high, float(fidelity.model_kl.max())))
    rho = fidelity.spearman
    axes.set_title("" if rho is None else f"Spearman's ρ = {rho:.2f}, {fidelity.n_tokens} tokens", fontsize=10)
    axes.set_xlabel("energy by the readout (nats per token)")
    axes.set_ylabel("KL in the model (nats per token)")
    axes.legend(fontsize=8)
    return figure


def _plain_numbers(axis: Any, low: float, high: float) -> None:
    """Label a logarithmic axis with numbers such as 6 and 0.05; between the powers of ten if it has few of these."""
    from matplotlib.ticker import NullFormatter

    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}" if high < 20 * low else NullFormatter())


def matplotlib_figure() -> type[Figure]:
    """Import and return matplotlib's class `Figure`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "a picture", "matplotlib", "pip install 'featurizers-causal-basis[plots]'"
        ) from error
    return Figure


def _viridis() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"]
