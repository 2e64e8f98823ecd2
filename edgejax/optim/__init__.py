"""Optimizers that hold little state, as optax transformations for any JAX model."""

from edgejax.optim.adamw import adamw, adamw4bit, adamw8bit, scale_by_adam
from edgejax.optim.apollo import apollo, apollo_mini, scale_by_apollo
from edgejax.optim.codes import Code
from edgejax.optim.moments import QuantizedMoment
from edgejax.optim.momentum import lion, lion8bit, sgd, sgd8bit
from edgejax.optim.rounding import round_stochastically, stochastic_rounding
from edgejax.optim.scale import scale_by_column_norm, scale_sgd

__all__ = [
    "Code",
    "QuantizedMoment",
    "adamw",
    "adamw4bit",
    "adamw8bit",
    "apollo",
    "apollo_mini",
    "lion",
    "lion8bit",
    "round_stochastically",
    "scale_by_adam",
    "scale_by_apollo",
    "scale_by_column_norm",
    "scale_sgd",
    "sgd",
    "sgd8bit",
    "stochastic_rounding",
]
