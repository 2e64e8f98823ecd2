"""Weights in few bits: the array type, packing, exact reading back."""

from edgejax.quant.array import Bfloat16Array as Bfloat16Array
from edgejax.quant.array import QuantizedArray as QuantizedArray
from edgejax.quant.array import Weight as Weight
from edgejax.quant.array import dequantize as dequantize
from edgejax.quant.array import is_quantized as is_quantized
from edgejax.quant.array import take_rows as take_rows
from edgejax.quant.pack import pack_nibbles as pack_nibbles
from edgejax.quant.pack import quantize_int4 as quantize_int4
from edgejax.quant.pack import quantize_int8 as quantize_int8
from edgejax.quant.pack import unpack_nibbles as unpack_nibbles
