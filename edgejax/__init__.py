"""edgejax: train and fine-tune language models inside the memory and time of a phone or a consumer GPU."""

__version__ = "0.1.0"
