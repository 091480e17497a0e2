"""Demo: find a causal variable in a language model, layer by layer, and save it as a featurizer.

`toy` and `english` make the two tasks; `main` sweeps the layers of one, prints and draws the accuracies, saves the best
subspace and loads it back.
"""
