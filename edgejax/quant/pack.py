"""Making quantised arrays, on the host in numpy, one leaf at a time.

Rounding is to the nearest code. ``int8`` is symmetric (scale = max |w| / 127), ``int4`` is affine (scale =
(max - min) / 15, minimum = min). Scales are float16 as in GGUF's Q8_0 and Q4_1, rounded away from zero so that the
largest weight keeps a code, and codes are chosen for the *stored* scale: the error of a weight is at most half of
it. A leaf with a block whose scale would have fewer than 4 bits in float16 (below 2**-20), or would overflow,
has float32 scales.
"""

import numpy as np

from edgejax.core.errors import ConfigError
from edgejax.quant.array import NIBBLES_PER_WORD, QuantizedArray

DEFAULT_BLOCK = 32
SMALLEST_F16_SCALE = 2.0**-20
LARGEST_F16 = float(np.finfo(np.float16).max)
SMALLEST_F32 = float(np.finfo(np.float32).tiny)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes 0..15 ``[..., I]`` -> uint32 words ``[..., I // 8]``; I must be a multiple of 8."""
    if codes.shape[-1] % NIBBLES_PER_WORD:
        raise ConfigError(f"4-bit codes need a row length that is a multiple of 8, not {codes.shape[-1]}")
    # Two codes a byte, the even one low, read as little-endian words: element i is in bits 4 * (i % 8).
    codes = codes.astype(np.uint8, copy=False)
    pairs = codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))
    return pairs.view("<u4")


def unpack_nibbles(words: np.ndarray) -> np.ndarray:
    """uint32 words ``[..., W]`` -> uint8 codes ``[..., 8 * W]``."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    codes = np.empty((*pairs.shape[:-1], 2 * pairs.shape[-1]), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = pairs & 15, pairs >> 4
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
    return QuantizedArray(pack_nibbles(codes.reshape(weights.shape)), scale, minimum, bits=4)


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
