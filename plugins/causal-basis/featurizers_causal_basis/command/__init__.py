"""Command ``fit causal-basis``. This room imports every other room but `compat`, when the command runs."""
