"""Names in which causal basis extraction was first published; see `featurizers_causal_basis.compat.white_box`."""

from featurizers_causal_basis.compat.white_box import CausalBasis, extract_causal_bases

__all__ = ["CausalBasis", "extract_causal_bases"]
