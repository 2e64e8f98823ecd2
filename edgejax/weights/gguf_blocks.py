"""GGUF block types as ``QuantizedArray`` codes: the same values, none of them changed.

A block type is exact here because what multiplies a code is exact in the scale we keep:

| type | block | codes | scale | minimum |
|---|---|---|---|---|
| Q8_0 | 32 | int8 | f16 d | |
| Q4_0 | 32 | 0..15 | f16 d | f16 -8 d (a power of two) |
| Q4_1 | 32 | 0..15 | f16 d | f16 m |
| Q5_0 | 32 | int8, q - 16 | f16 d | |
| Q5_1 | 32 | int8 | f16 d | f16 m |
| Q4_K | 32 | 0..15 | f32 d sc (11 + 6 bits) | f32 -(dmin m) |
| Q5_K | 32 | int8 | f32 d sc | f32 -(dmin m) |
| Q6_K | 16 | int8, q - 32 | f32 d sc (11 + 7 bits) | |
| TQ2_0 | 256 | ternary | f16 d | |

``code * scale`` is exact in float32 too (at most 25 bits, Q6_K, are rounded once, as in ggml), so a fused
multiply-add gives the same bits as a multiplication and an addition. Layouts: ggml-common.h and ggml-quants.c of
llama.cpp; the tests hold every type bit-equal to ``gguf.quants.dequantize``.
"""

import ml_dtypes
import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from jaxtyping import UInt8

from edgejax.core.errors import WeightsError
from edgejax.quant import TERNARY, QuantizedArray, pack_codes
from edgejax.weights.form import Form

FLOAT_DTYPES = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(ml_dtypes.bfloat16),
}

_F16, _F32 = np.dtype(np.float16), np.dtype(np.float32)
CODE_FORMS = {
    Type.Q8_0: Form(bits=8, block=32, dtype=_F16, has_minimum=False),
    Type.Q4_0: Form(bits=4, block=32, dtype=_F16, has_minimum=True),
    Type.Q4_1: Form(bits=4, block=32, dtype=_F16, has_minimum=True),
    Type.Q5_0: Form(bits=8, block=32, dtype=_F16, has_minimum=False),
    Type.Q5_1: Form(bits=8, block=32, dtype=_F16, has_minimum=True),
    Type.Q4_K: Form(bits=4, block=32, dtype=_F32, has_minimum=True),
    Type.Q5_K: Form(bits=8, block=32, dtype=_F32, has_minimum=True),
    Type.Q6_K: Form(bits=8, block=16, dtype=_F32, has_minimum=False),
    Type.TQ2_0: Form(bits=TERNARY, block=256, dtype=_F16, has_minimum=False),
}


def block_form(kind: Type, where: str) -> Form:
    """How a tensor of this type is held exactly; ``where`` begins the error for types that are not supported."""
    if kind in FLOAT_DTYPES:
        return Form(bits=None, block=None, dtype=FLOAT_DTYPES[kind], has_minimum=False)
    if kind in CODE_FORMS:
        return CODE_FORMS[kind]
    supported = ", ".join(k.name for k in (*FLOAT_DTYPES, *CODE_FORMS))
    raise WeightsError(f"{where}: block type {kind.name} is not supported; use a file in one of: {supported}")


def decode_rows(kind: Type, rows: UInt8[np.ndarray, "N bytes"]) -> QuantizedArray | np.ndarray:
    """Raw rows of a GGUF tensor -> ``[N, I]``, as floats of the file's own type or as codes."""
    if kind in FLOAT_DTYPES:
        return rows.view(FLOAT_DTYPES[kind])
    return _DECODERS[kind](rows)


def _blocks(rows: np.ndarray, n_bytes: int) -> np.ndarray:
    return rows.reshape(rows.shape[0], -1, n_bytes)


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte ``at`` of each block, ``[N, blocks]``."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _words(nibbles: np.ndarray) -> np.ndarray:
    """Bytes holding element j (low) and j + half (high) -> our words, which hold neighbours in turn.

    nibbles: uint8 ``[N, blocks, half]``, a block being 2 * half elements. Returns uint32 ``[N, I // 8]``.
    """
    even, odd = nibbles[..., 0::2], nibbles[..., 1::2]
    out = np.empty((*nibbles.shape[:-1], 2, nibbles.shape[-1] // 2), np.uint8)
    out[..., 0, :] = (even & 15) | (odd << 4)
    out[..., 1, :] = (even >> 4) | (odd & 0xF0)
    return out.reshape(nibbles.shape[0], -1).view("<u4")


def _codes(nibbles: np.ndarray) -> np.ndarray:
    """The same bytes -> one code a byte, ``[N, blocks, 2, half]``: low nibbles come first."""
    return np.stack([nibbles & 15, nibbles >> 4], axis=-2)


def _q8_0(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 34)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(rows.shape[0], -1)
    return QuantizedArray(codes, _f16(blocks, 0), None, bits=8)


def _q4_0(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 18)
    scale = _f16(blocks, 0)
    minimum = scale.astype(np.float32) * -8
    if np.abs(minimum).max(initial=0) > np.finfo(np.float16).max:  # a scale above 8188
        return QuantizedArray(_words(blocks[..., 2:]), scale.astype(np.float32), minimum, bits=4)
    return QuantizedArray(_words(blocks[..., 2:]), scale, minimum.astype(np.float16), bits=4)


def _q4_1(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 20)
    return QuantizedArray(_words(blocks[..., 4:]), _f16(blocks, 0), _f16(blocks, 2), bits=4)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """Bit i of the uint32 at byte ``at`` as 16 for element i, uint8 ``[N, blocks, 32]``."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[..., at : at + 4]), axis=-1, bitorder="little")
    return bits << 4


def _q5_0(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 22)
    codes = _codes(blocks[..., 6:]).reshape(*blocks.shape[:2], 32) | _fifth_bits(blocks, 2)
    codes = (codes.astype(np.int8) - np.int8(16)).reshape(rows.shape[0], -1)
    return QuantizedArray(codes, _f16(blocks, 0), None, bits=8)


def _q5_1(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 24)
    codes = _codes(blocks[..., 8:]).reshape(*blocks.shape[:2], 32) | _fifth_bits(blocks, 4)
    return QuantizedArray(
        codes.astype(np.int8).reshape(rows.shape[0], -1), _f16(blocks, 0), _f16(blocks, 2), bits=8
    )


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum of the 8 sub-blocks of Q4_K and Q5_K, f32 ``[N, blocks * 8]``.

    Twelve bytes hold eight 6-bit scales and minima: four of each in the low bits of bytes 0-3 and 4-7; the rest
    has its low 4 bits in bytes 8-11 and its high 2 bits above the first four.
    """
    packed = blocks[..., 4:16]
    low_sc, low_m, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    sc = np.concatenate([low_sc & 63, (rest & 15) | ((low_sc >> 2) & 48)], axis=-1)
    m = np.concatenate([low_m & 63, (rest >> 4) | ((low_m >> 2) & 48)], axis=-1)
    scale = _f16(blocks, 0).astype(np.float32)[..., None] * sc.astype(np.float32)
    minimum = -(_f16(blocks, 2).astype(np.float32)[..., None] * m.astype(np.float32))
    n = blocks.shape[0]
    return scale.reshape(n, -1), minimum.reshape(n, -1)


def _q4_k(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 144)
    scale, minimum = _k_scales(blocks)
    return QuantizedArray(_words(blocks[..., 16:].reshape(rows.shape[0], -1, 32)), scale, minimum, bits=4)


def _q5_k(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 176)
    scale, minimum = _k_scales(blocks)
    low = _codes(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32)).reshape(*blocks.shape[:2], 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = ((blocks[..., None, 16:48] >> shifts) & 1) << 4  # bit s of byte i: element i of sub-block s
    return QuantizedArray((low | fifth).astype(np.int8).reshape(rows.shape[0], -1), scale, minimum, bits=8)


def _q6_k(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 210)
    lead = blocks.shape[:2]
    low = _codes(blocks[..., :128].reshape(*lead, 2, 64)).reshape(*lead, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = ((blocks[..., 128:192].reshape(*lead, 2, 1, 32) >> shifts) & 3) << 4
    codes = ((low | high).astype(np.int8) - np.int8(32)).reshape(rows.shape[0], -1)
    sub = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    scale = _f16(blocks, 208).astype(np.float32)[..., None] * sub
    return QuantizedArray(codes, scale.reshape(rows.shape[0], -1), None, bits=8)


def _tq2_0(rows: np.ndarray) -> QuantizedArray:
    blocks = _blocks(rows, 66)
    halves = blocks[..., :64].reshape(*blocks.shape[:2], 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = ((halves >> shifts) & 3).reshape(rows.shape[0], -1)
    return QuantizedArray(pack_codes(codes, TERNARY), _f16(blocks, 64), None, bits=TERNARY)


_DECODERS = {
    Type.Q8_0: _q8_0,
    Type.Q4_0: _q4_0,
    Type.Q4_1: _q4_1,
    Type.Q5_0: _q5_0,
    Type.Q5_1: _q5_1,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q5_k,
    Type.Q6_K: _q6_k,
    Type.TQ2_0: _tq2_0,
}
