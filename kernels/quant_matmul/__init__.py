"""Products with weights held in 4 or 8 bits."""

from edgejax.kernels.quant_matmul.reference import quant_matmul_reference as quant_matmul_reference
from edgejax.kernels.quant_matmul.xla import quant_matmul_xla as quant_matmul
