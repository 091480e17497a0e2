"""Search: `train` looks for features whose interchange makes the model give the counterfactual answers.

`Settings` say how it runs, `objectives` what it minimises and `checkpoints` how it is resumed. `Found` is its result,
which becomes an artefact.
"""
