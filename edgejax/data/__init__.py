from edgejax.data.batch import Batch
from edgejax.data.tokenizer import Tokenizer

__all__ = ["Batch", "Tokenizer"]
