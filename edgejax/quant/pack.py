"""Making quantised arrays, on the host in numpy, one leaf at a time.

Rounding is to the nearest code. ``int8`` is symmetric (scale = max |w| / 127), ``int4`` is affine (scale =
(max - min) / 15, minimum = min), ``ternary`` has the scale with which the squares of a block's errors are least.
Scales are float16 as in GGUF's Q8_0 and Q4_1, rounded away from zero so that the largest weight keeps a code, and
codes are chosen for the *stored* scale: the error of a weight in 4 or 8 bits is at most half of it. A leaf with a
block whose scale would have fewer than 4 bits in float16 (below 2**-20), or would overflow, has float32 scales.
"""

import math

import numpy as np

from edgejax.core.errors import ConfigError
from edgejax.quant.array import TERNARY, QuantizedArray, codes_per_word

DEFAULT_BLOCK = 32
TERNARY_BLOCK = 256  # of GGUF's TQ2_0
SMALLEST_F16_SCALE = 2.0**-20
LARGEST_F16 = float(np.finfo(np.float16).max)
SMALLEST_F32 = float(np.finfo(np.float32).tiny)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes of 2 or 4 bits ``[..., I]``, as they are stored -> uint32 words ``[..., I * bits // 32]``.

    Raises:
      ConfigError: I is not a multiple of the codes of a word.
    """
    if codes.shape[-1] % codes_per_word(bits):
        raise ConfigError(
            f"{bits}-bit codes need a row length that is a multiple of {codes_per_word(bits)}, not {codes.shape[-1]}"
        )
    # Bytes that are read as little-endian words: element i of a word begins at bit bits * i.
    codes, n = codes.astype(np.uint8, copy=False), 8 // bits
    packed = codes[..., 0::n].copy()
    for i in range(1, n):
        packed |= codes[..., i::n] << np.uint8(bits * i)
    return packed.view("<u4")


def unpack_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words ``[..., W]`` -> uint8 codes of 2 or 4 bits as they are stored, ``[..., 32 // bits * W]``."""
    packed, n = np.ascontiguousarray(words).view(np.uint8), 8 // bits
    codes = np.empty((*packed.shape[:-1], n * packed.shape[-1]), np.uint8)
    for i in range(n):
        codes[..., i::n] = (packed >> np.uint8(bits * i)) & np.uint8(2**bits - 1)
    return codes


def quantize_int8(weights: np.ndarray, block: int = DEFAULT_BLOCK) -> QuantizedArray:
    """Symmetric 8 bits. weights: finite floats ``[..., O, I]``, I a multiple of ``block``."""
    blocks = _blocks(weights, block)
    scale = _stored_scale(np.abs(blocks).max(axis=-1) / np.float32(127))
    codes = _nearest_codes(blocks, scale, -127, 127).astype(np.int8)
    return QuantizedArray(codes.reshape(weights.shape), scale, None, bits=8)


def quantize_int4(weights: np.ndarray, block: int = DEFAULT_BLOCK) -> QuantizedArray:
    """Affine 4 bits. weights: finite floats ``[..., O, I]``, I a multiple of ``block``."""
    blocks = _blocks(weights, block)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    # An all-positive or all-negative block keeps zero inside its range: idle weights stay idle.
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _stored_scale((high - low) / np.float32(15), largest=-low.min(initial=0))
    minimum = low.astype(scale.dtype)
    codes = _nearest_codes(blocks - minimum[..., None].astype(np.float32), scale, 0, 15).astype(np.uint8)
    return QuantizedArray(pack_codes(codes.reshape(weights.shape), 4), scale, minimum, bits=4)


def quantize_ternary(weights: np.ndarray, block: int | None = None) -> QuantizedArray:
    """-scale, 0 or scale, with the least squared error of a block: weights that are so already stay so, their scale in float16.

    With the k largest magnitudes of a block kept, the best scale is their mean m_k, and k m_k^2 is what the squared error is
    less than without any; the best k is found by trying all (problem: Li and Liu, "Ternary Weight Networks", arXiv
    1605.04711, equations 1 to 3, where a threshold approximates it).

    Args:
      weights: finite floats ``[..., O, I]``.
      block: I must be a multiple of it; None: ``ternary_block(I)``.

    Example:
      >>> held = quantize_ternary(np.array([[0.5, -0.5, 0.0, 0.5] * 8], np.float32))
      >>> held.dequantize()[0, :4].tolist(), held.block
      ([0.5, -0.5, 0.0, 0.5], 32)
    """
    blocks = _blocks(weights, ternary_block(weights.shape[-1]) if block is None else block)
    largest_first = -np.sort(-np.abs(blocks), axis=-1)
    total = np.cumsum(largest_first, axis=-1, dtype=np.float64)
    count = np.arange(1, blocks.shape[-1] + 1)
    best = np.argmax(total * total / count, axis=-1)[..., None]
    mean = (np.take_along_axis(total, best, axis=-1) / (best + 1))[..., 0].astype(np.float32)
    scale = _stored_scale(mean)
    codes = (_nearest_codes(blocks, scale, -1, 1) + 1).astype(np.uint8)
    return QuantizedArray(pack_codes(codes.reshape(weights.shape), TERNARY), scale, None, bits=TERNARY)


def ternary_block(width: int) -> int:
    """The largest power of two up to ``TERNARY_BLOCK`` that divides rows of ``width``.

    >>> ternary_block(2048), ternary_block(576)
    (256, 64)
    """
    return math.gcd(width, TERNARY_BLOCK)


def _blocks(weights: np.ndarray, block: int) -> np.ndarray:
    if weights.shape[-1] % block:
        raise ConfigError(
            f"rows of {weights.shape[-1]} weights do not divide into blocks of {block}; keep this leaf in bf16 or f32"
        )
    return np.asarray(weights, np.float32).reshape(*weights.shape[:-1], -1, block)


def _stored_scale(scale: np.ndarray, largest: float = 0.0) -> np.ndarray:
    """float16 scales not below ``scale``; float32 where one has too few bits in float16, or ``largest`` overflows."""
    too_small = ((scale > 0) & (scale < SMALLEST_F16_SCALE)).any()
    if too_small or max(scale.max(initial=0), largest) > LARGEST_F16:
        return scale
    stored = scale.astype(np.float16)
    return np.where(stored < scale, np.nextafter(stored, np.float16(np.inf)), stored)


def _nearest_codes(blocks: np.ndarray, scale: np.ndarray, low: int, high: int) -> np.ndarray:
    """``clip(round(blocks / scale))`` as float32; zero where the scale is (or has no finite inverse)."""
    wide = scale.astype(np.float32)[..., None]
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide > SMALLEST_F32)
    codes = blocks * inverse
    np.rint(codes, out=codes)
    return np.clip(codes, low, high, out=codes)
