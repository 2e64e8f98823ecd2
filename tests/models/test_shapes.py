"""Shapes by name: those of the published models."""

import pytest

from edgejax.core.errors import ConfigError
from edgejax.models.shapes import SHAPES, find_shape
from edgejax.weights.presets import PRESETS

pytestmark = pytest.mark.quick
# Parameters as the models' cards and safetensors indices give them; those of presets are in PRESETS.
PUBLISHED = {
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.2-3b": 3_212_749_824,
    "llama-13b": 13_015_864_320,
}


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"tiny"}))
def test_shapes_have_the_parameters_of_the_published_models(name):
    wanted = PRESETS[name].n_params if name in PRESETS else PUBLISHED[name]
    assert SHAPES[name].n_params() == wanted


def test_gemma_has_a_global_layer_after_five_sliding_ones():
    sliding = SHAPES["gemma-3-1b"].sliding_layers
    assert [layer for layer, is_sliding in enumerate(sliding) if not is_sliding] == [5, 11, 17, 23]


def test_an_unknown_shape_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no shape named 'llama-3.2-2b'; the nearest: llama-3.2-\db"):
        find_shape("llama-3.2-2b")
