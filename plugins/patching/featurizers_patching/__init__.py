"""Exact activation patching: the effect of each edit of a grid, a whole sweep in a few forward passes."""
