"""Runs of the model: clean ones, each distinct prompt once, and runs with edits that begin where those end.

`CleanRuns` is the entry. A search asks it for logits after edits; how much of the model that takes is
decided here.
"""
