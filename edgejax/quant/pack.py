"""Making quantised arrays, on the host in numpy, one leaf at a time.

Rounding is to the nearest code. ``int8`` is symmetric (scale = max |w| / 127), ``int4`` is affine (scale =
(max - min) / 15, minimum = min). Scales are float16 as in GGUF's Q8_0 and Q4_1, and codes are chosen for the
*stored* scale, so that its rounding costs no accuracy.
"""

import numpy as np

from edgejax.core.errors import ConfigError
from edgejax.quant.array import NIBBLE_SHIFTS, NIBBLES_PER_WORD, QuantizedArray

DEFAULT_BLOCK = 32


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 codes 0..15 ``[..., I]`` -> uint32 words ``[..., I // 8]``; I must be a multiple of 8."""
    if codes.shape[-1] % NIBBLES_PER_WORD:
        raise ConfigError(f"4-bit codes need a row length that is a multiple of 8, not {codes.shape[-1]}")
    grouped = codes.reshape(*codes.shape[:-1], -1, NIBBLES_PER_WORD).astype(np.uint32)
    return np.bitwise_or.reduce(grouped << NIBBLE_SHIFTS, axis=-1)


def unpack_nibbles(words: np.ndarray) -> np.ndarray:
    """uint32 words ``[..., W]`` -> uint8 codes ``[..., 8 * W]``."""
    codes = (words[..., None] >> NIBBLE_SHIFTS) & np.uint32(15)
    return codes.astype(np.uint8).reshape(*words.shape[:-1], -1)


def quantize_int8(weights: np.ndarray, block: int = DEFAULT_BLOCK) -> QuantizedArray:
    """Symmetric 8 bits. weights: float ``[..., O, I]``, I a multiple of ``block``."""
    blocks = _blocks(weights, block)
    scale = (np.abs(blocks).max(axis=-1) / 127).astype(np.float16)
    scale = _no_subnormal_loss(scale, np.abs(blocks).max(axis=-1) / 127)
    codes = np.clip(np.rint(_divide(blocks, scale)), -127, 127).astype(np.int8)
    return QuantizedArray(codes.reshape(weights.shape), scale, None, bits=8)


def quantize_int4(weights: np.ndarray, block: int = DEFAULT_BLOCK) -> QuantizedArray:
    """Affine 4 bits. weights: float ``[..., O, I]``, I a multiple of ``block``."""
    blocks = _blocks(weights, block)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    # An all-positive or all-negative block keeps zero inside its range: idle weights stay idle.
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = _no_subnormal_loss(((high - low) / 15).astype(np.float16), (high - low) / 15)
    minimum = low.astype(scale.dtype)
    codes = np.clip(np.rint(_divide(blocks - minimum[..., None].astype(np.float32), scale)), 0, 15)
    words = pack_nibbles(codes.astype(np.uint8).reshape(weights.shape))
    return QuantizedArray(words, scale, minimum, bits=4)


def _blocks(weights: np.ndarray, block: int) -> np.ndarray:
    if weights.shape[-1] % block:
        raise ConfigError(
            f"rows of {weights.shape[-1]} weights do not divide into blocks of {block}; keep this leaf in bf16 or f32"
        )
    return np.asarray(weights, np.float32).reshape(*weights.shape[:-1], -1, block)


def _no_subnormal_loss(scale16: np.ndarray, scale32: np.ndarray) -> np.ndarray:
    """float16 scales, or float32 where float16 would overflow or lose bits below its normal range."""
    tiny = float(np.finfo(np.float16).tiny)
    unsafe = ~np.isfinite(scale16) | ((scale32 > 0) & (scale32 < tiny))
    return scale32.astype(np.float32) if unsafe.any() else scale16


def _divide(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    wide = scale.astype(np.float32)[..., None]
    return np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide != 0)
