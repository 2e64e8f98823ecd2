"""Cross-entropy of a linear head, without its logits."""

from edgejax.kernels.linear_ce.api import linear_cross_entropy as linear_cross_entropy
from edgejax.kernels.linear_ce.reference import (
    linear_cross_entropy_reference as linear_cross_entropy_reference,
)
