"""Cost of an interchange through a dictionary, by its sizes: ``python benchmarks/growth_of_dictionaries.py``.

It draws docs/benchmarks-dictionaries.png, in CPU seconds as plots.py does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dictionaries
import timing
import torch
from matplotlib import pyplot

D, TOKENS = 768, 256
SWAPPED, HELD = (1, 8, 64, 512, 2048, 8192), (2048, 4096, 8192, 16384, 32768)
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks-dictionaries.png"


def point(settings: timing.Settings, n_features: int, k: int) -> tuple[float, float]:
    """Return the CPU seconds of this library and of the peer."""
    ours, sae = dictionaries.pair(settings, n_features, "jumprelu", D)
    theirs = dictionaries.SaeLensFeaturizer(sae)
    base, source = (settings.randn(TOKENS, D, seed=seed) for seed in (1, 2))
    chosen = torch.randperm(n_features, generator=torch.Generator().manual_seed(0))[:k]
    with torch.no_grad():
        seconds = [
            timing.cpu_seconds(lambda f=f: f.interchange(base, source, chosen), settings, samples=3)
            for f in (ours, theirs)
        ]
    return seconds[0], seconds[1]


def panel(axis: Any, sizes: tuple[int, ...], points: list[tuple[float, float]], label: str) -> None:
    """Draw both curves."""
    axis.loglog(sizes, [theirs for _, theirs in points], "s--", color="0.45", label="over SAELens")
    axis.loglog(sizes, [ours for ours, _ in points], "o-", color="C0", label="featurizers")
    axis.set_xlabel(label)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.grid(True, alpha=0.25)


def main() -> None:
    torch.set_num_threads(1)
    settings = timing.Settings(torch.device("cpu"))
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    most = 16384
    panel(axes[0], SWAPPED, [point(settings, most, k) for k in SWAPPED], f"features swapped, of {most}")
    panel(axes[1], HELD, [point(settings, n, 32) for n in HELD], "features of the dictionary, 32 swapped")
    axes[0].set_ylabel(f"CPU seconds, {TOKENS} tokens, d = {D}")
    axes[0].legend(frameon=False)
    figure.savefig(PICTURE, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
