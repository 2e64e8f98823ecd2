"""Optimizers that hold little state, as optax transformations."""
