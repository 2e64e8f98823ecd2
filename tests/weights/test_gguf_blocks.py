"""Every block type: the same values as ``gguf`` computes, none of them changed."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from weight_files import raw_tensor

from edgejax.core.errors import WeightsError
from edgejax.quant import QuantizedArray
from edgejax.weights.form import convert, form_of, join_forms, wide
from edgejax.weights.gguf_blocks import CODE_FORMS, FLOAT_DTYPES, block_form, decode_rows

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", [*CODE_FORMS, *FLOAT_DTYPES], ids=lambda kind: kind.name)
def test_values_are_those_of_gguf_to_the_bit(kind):
    raw, _ = raw_tensor(kind, (5, 768), np.random.default_rng(1))
    raw = np.ascontiguousarray(raw).view(np.uint8).reshape(5, -1)
    decoded, expected = decode_rows(kind, raw), gguf.quants.dequantize(raw, kind)
    assert form_of(decoded) == block_form(kind, "x")
    np.testing.assert_array_equal(wide(decoded), expected)
    if isinstance(decoded, QuantizedArray):
        np.testing.assert_array_equal(np.asarray(decoded.dequantize()), expected)
        assert decoded.shape == expected.shape


def test_every_code_is_reached():
    """Random K blocks use all codes and all 6-bit scales, so that no bit of a block is read wrongly unseen."""
    for kind, codes in ((Type.Q5_K, range(32)), (Type.Q6_K, range(-32, 32))):
        raw, _ = raw_tensor(kind, (64, 768), np.random.default_rng(2))
        assert set(np.unique(np.asarray(decode_rows(kind, raw).codes))) == set(codes)


def test_q4_0_with_a_scale_near_the_end_of_float16():
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.array([60_000.0], np.float16).view(np.uint8)
    decoded = decode_rows(Type.Q4_0, raw)
    assert decoded.minimum.dtype == np.float32  # -8 * 60,000 is no float16
    np.testing.assert_array_equal(wide(decoded), gguf.quants.dequantize(raw, Type.Q4_0))


def test_zero_blocks_are_exact_zeros():
    for kind in CODE_FORMS:
        raw = np.zeros((2, gguf.constants.GGML_QUANT_SIZES[kind][1]), np.uint8)
        assert not wide(decode_rows(kind, raw)).any()


@pytest.mark.parametrize(
    "pair",
    [
        (Type.Q4_K, Type.Q6_K),
        (Type.Q4_0, Type.Q8_0),
        (Type.Q4_1, Type.Q5_K),
        (Type.Q8_0, Type.F16),
        (Type.TQ2_0, Type.Q4_0),
        (Type.TQ2_0, Type.Q6_K),
        (Type.TQ2_0, Type.BF16),
    ],
)
def test_mixed_types_share_a_form_that_changes_no_value(pair):
    decoded = []
    for kind in pair:
        raw, _ = raw_tensor(kind, (3, 512), np.random.default_rng(3))
        decoded.append(
            (decode_rows(kind, np.ascontiguousarray(raw).view(np.uint8).reshape(3, -1)), raw, kind)
        )
    joined = join_forms(form_of(leaf) for leaf, _, _ in decoded)
    for leaf, raw, kind in decoded:
        same = convert(leaf, joined)
        assert form_of(same) == joined
        np.testing.assert_array_equal(wide(same), gguf.quants.dequantize(raw, kind))


def test_a_type_that_is_not_held_is_named():
    with pytest.raises(WeightsError, match=r"blk\.0.*Q2_K is not supported.*Q4_K"):
        block_form(Type.Q2_K, "blk.0")
