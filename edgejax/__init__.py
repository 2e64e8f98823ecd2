"""edgejax: train and fine-tune language models inside the memory and time of a phone or a consumer GPU."""

from edgejax.core.guard import install_guard

__version__ = "0.1.0"

install_guard()  # sets an XLA flag before JAX starts; see edgejax/core/guard.py
