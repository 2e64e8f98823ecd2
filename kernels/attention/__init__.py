"""Causal attention with grouped heads, segments and sliding windows."""

from edgejax.kernels.attention.api import attention as attention
from edgejax.kernels.attention.api import attention_keeping as attention_keeping
from edgejax.kernels.attention.api import attention_recalled as attention_recalled
from edgejax.kernels.attention.decode import decode_attention as decode_attention
from edgejax.kernels.attention.reference import attention_reference as attention_reference
