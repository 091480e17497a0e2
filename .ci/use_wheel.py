"""Make, save, load and use what one distribution provides, in an environment without the development group."""

import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

import featurizers
import torch


def round_trip(kind: str, **config: object) -> None:
    """Create a featurizer, save it, load it, and interchange its features."""
    featurizer = featurizers.create(kind, **config)
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    with tempfile.TemporaryDirectory() as folder:
        again = featurizers.load(featurizer.save_pretrained(Path(folder) / "it"), verify=True)
    assert torch.equal(again.interchange(x, y), featurizer.interchange(x, y))
    assert torch.equal(again.interchange(x, x), x)


def command(*words: str) -> str:
    """Run the ``featurizers`` command and return what it prints."""
    done = subprocess.run([sys.executable, "-m", "featurizers", *words], capture_output=True, text=True, check=True)
    return done.stdout


def dictionary() -> "featurizers.Featurizer":
    """Return a small dictionary, which the formats of other libraries can hold."""
    return featurizers.create("dictionary", d_in=8, n_features=16)


def core() -> None:
    """The core alone: its two kinds, and its commands."""
    round_trip("dictionary", d_in=8, n_features=16)
    assert "dictionary" in command("kinds")


def converted(plugin: str) -> None:
    """Write a dictionary in the format of a plugin and read it again."""
    with tempfile.TemporaryDirectory() as folder:
        source = dictionary()
        featurizers.convert(source, Path(folder) / "it", plugin)
        again = featurizers.load(Path(folder) / "it")
    x = torch.randn(3, 8)
    assert torch.allclose(again.encode(x), source.encode(x), atol=1e-6)


CHECKS = {
    "core": core,
    "identity": lambda: round_trip("identity", d_in=8),
    "subspace": lambda: (round_trip("subspace", d_in=8, n_features=2), round_trip("subspace", d_in=8, n_features=8)),
    "sae-lens": lambda: converted("sae-lens"),
    "dictionary-learning": lambda: converted("dictionary-learning"),
    "sparsify": lambda: converted("sparsify"),
    "training": lambda: command("train", "--help"),
    "causal-basis": lambda: command("fit", "causal-basis", "--help"),
    "derived-scalars": lambda: command("scalars", "--list"),
    "transformer-debugger": lambda: command("scalars", "--list"),
}


def main() -> None:
    """Check one distribution, named as its folder."""
    name = sys.argv[1]
    distribution = "featurizers" if name == "core" else f"featurizers-{name}"
    assert requires(distribution), distribution
    assert "site-packages" in featurizers.__file__, featurizers.__file__
    if name != "core":
        featurizers.check_plugins()
        assert name in featurizers.kinds()
    CHECKS.get(name, core)()
    print(f"{distribution}: made, saved, loaded and used")


if __name__ == "__main__":
    main()
