"""Definitions of the metrics: each name with its unit, its formula, and the name that SAELens has for it."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Group = Literal["reconstruction", "sparsity", "effect"]
GROUPS: Final[tuple[Group, ...]] = ("reconstruction", "sparsity", "effect")
"""Groups that are measured unless others are asked for."""
ON_REQUEST: Final = ("fidelity",)
"""Groups that are measured only if they are asked for."""
ABLATIONS: Final = ("zero", "mean")


class Definition(NamedTuple):
    """Definition of a metric.

    Attributes:
        group: of metrics that are measured together.
        unit: of the value.
        text: formula in words; y is the activation that is to be reconstructed, ŷ the reconstruction without the error.
        better: whether a higher or a lower value is better; None if neither.
        sae_lens: key in the results of `sae_lens.evals.run_evals`; None if it has no such metric.
    """

    group: Group | Literal["interchange", "fidelity"]
    unit: str
    text: str
    better: Literal["higher", "lower"] | None = None
    sae_lens: str | None = None


_ABLATED: Final = {
    "zero": "every activation at the site, of excluded tokens too, replaced by zeros",
    "mean": "every activation at the site, of excluded tokens too, replaced by the mean of those measured",
}


def _of_ablations() -> dict[str, Definition]:
    found: dict[str, Definition] = {}
    for name, text in _ABLATED.items():
        keys = (
            ("ce_loss_with_ablation", "ce_loss_score", "kl_div_with_ablation", "kl_div_score")
            if name == "zero"
            else (None,) * 4
        )
        found |= {
            f"ce_loss_{name}_ablation": Definition("effect", "nats", f"cross-entropy with {text}", None, keys[0]),
            f"ce_recovered_{name}_ablation": Definition(
                "effect",
                "share",
                f"(ce_loss_{name}_ablation - ce_loss) / (ce_loss_{name}_ablation - ce_loss_clean)",
                "higher",
                keys[1],
            ),
            f"kl_{name}_ablation": Definition(
                "effect", "nats", f"KL divergence of the model from that with {text}", None, keys[2]
            ),
            f"kl_recovered_{name}_ablation": Definition(
                "effect", "share", f"1 - kl / kl_{name}_ablation", "higher", keys[3]
            ),
        }
    return found


DEFINITIONS: Final[dict[str, Definition]] = {
    "explained_variance": Definition("reconstruction", "share", "1 - fvu", "higher", "explained_variance"),
    "fvu": Definition(
        "reconstruction",
        "share",
        "fraction of variance unexplained: sum of |y - ŷ|² over sum of |y - mean y|², the mean over all tokens",
        "lower",
    ),
    "mse": Definition("reconstruction", "activation²", "mean of |y - ŷ|², summed over coordinates", "lower", "mse"),
    "cosine": Definition(
        "reconstruction",
        "cosine",
        "mean of y·ŷ / (|y| |ŷ|); 0 for a token where one of the two is zero",
        "higher",
        "cossim",
    ),
    "l2_norm_in": Definition("reconstruction", "activation", "mean of |y|", None, "l2_norm_in"),
    "l2_norm_out": Definition("reconstruction", "activation", "mean of |ŷ|", None, "l2_norm_out"),
    "l2_ratio": Definition(
        "reconstruction", "share", "mean of |ŷ| / |y|; |y| below 0.0001 counts as 1", None, "l2_ratio"
    ),
    "relative_reconstruction_bias": Definition(
        "reconstruction",
        "share",
        "mean of |ŷ|² over mean of y·ŷ, both over all tokens (arXiv:2404.16014, equation 10); SAELens averages the "
        "ratios of batches, which is the same for one batch",
        None,
        "relative_reconstruction_bias",
    ),
    "l0": Definition("sparsity", "features", "mean number of features of a token that are not 0", None, "l0"),
    "l1": Definition("sparsity", "feature units", "mean sum of the features' magnitudes", None, "l1"),
    "dead_features": Definition(
        "sparsity", "share", "share of the features that are 0 at every token measured", "lower"
    ),
    "dense_features_1_percent": Definition(
        "sparsity", "share", "share of the features that are not 0 at more than 1 % of the tokens"
    ),
    "dense_features_10_percent": Definition(
        "sparsity", "share", "share of the features that are not 0 at more than 10 % of the tokens"
    ),
    "ce_loss_clean": Definition(
        "effect",
        "nats",
        "cross-entropy of the next token, at measured tokens that have one, of the model itself",
        None,
        "ce_loss_without_sae",
    ),
    "ce_loss": Definition(
        "effect", "nats", "the same with ŷ in the place of y at the tokens measured", "lower", "ce_loss_with_sae"
    ),
    "kl": Definition(
        "effect",
        "nats",
        "KL divergence of the model from that with ŷ in the place of y, at the tokens measured",
        "lower",
        "kl_div_with_sae",
    ),
    **_of_ablations(),
    "interchange_accuracy": Definition(
        "interchange",
        "share",
        "share of the pairs answered with the label after an interchange of the selected features",
        "higher",
    ),
    "fidelity_spearman": Definition(
        "fidelity",
        "rank correlation",
        "Spearman's correlation of the energies of a causal basis with the divergence of the model when each direction "
        "is ablated (arXiv:2303.08112, section 4.2)",
        "higher",
    ),
    "fidelity_kl": Definition(
        "fidelity", "nats", "KL divergence of the model from that with one direction ablated, the mean over directions"
    ),
    "fidelity_control_kl": Definition("fidelity", "nats", "the same for as many random orthonormal directions"),
}
"""Metrics in the order in which they are shown."""
