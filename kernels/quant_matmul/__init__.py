"""Products with frozen weights held in 2, 4, 8, 16 or 32 bits, with or without a LoRA pair."""

from edgejax.kernels.quant_matmul.reference import quant_matmul_reference
from edgejax.kernels.quant_matmul.xla import lora_matmul_xla as lora_matmul
from edgejax.kernels.quant_matmul.xla import quant_matmul_xla as quant_matmul

__all__ = ["lora_matmul", "quant_matmul", "quant_matmul_reference"]
