"""Sweeps: the same search at many sites and positions by several methods, beside baselines and controls.

`sweep` makes one, `controls` say what is taken away in a control, and `report` draws the tables and pictures.
"""
