"""Weights in few bits: the array type, packing, exact reading back."""

from edgejax.quant.array import TERNARY as TERNARY
from edgejax.quant.array import Bfloat16Array as Bfloat16Array
from edgejax.quant.array import QuantizedArray as QuantizedArray
from edgejax.quant.array import Weight as Weight
from edgejax.quant.array import codes_per_word as codes_per_word
from edgejax.quant.array import dequantize as dequantize
from edgejax.quant.array import is_quantized as is_quantized
from edgejax.quant.array import take_rows as take_rows
from edgejax.quant.pack import pack_codes as pack_codes
from edgejax.quant.pack import quantize_int4 as quantize_int4
from edgejax.quant.pack import quantize_int8 as quantize_int8
from edgejax.quant.pack import quantize_ternary as quantize_ternary
from edgejax.quant.pack import ternary_block as ternary_block
from edgejax.quant.pack import unpack_codes as unpack_codes
