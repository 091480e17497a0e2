"""Report of a featurizer: what each feature is active on, what it writes, and one page that shows it.

The files, lowest first: `histograms` and `contexts` of features, `tallies` (both, and sums, in one reading of the
data), `top` (the largest of many numbers), `directions` that features write, `stream` (which sites are added to the
residual stream), `effects` on the logits, `neighbours`, `texts` of tokens, `result`, `packing` and `page`, `making`.
"""
