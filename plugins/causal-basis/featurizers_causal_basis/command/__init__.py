"""Command ``fit causal-basis``. This room imports every other room but `compat`."""

from featurizers_causal_basis.command.fit import fit_command

__all__ = ["fit_command"]
