"""A byte-level tokenizer of 400 tokens that speaks ChatML, built in place."""

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edgejax.data import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The template of SmolLM2: a system turn of its own when the conversation has none.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps on, and the fox is gone.",
    "def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n    return a * b\n",
    "user assistant system helpful question answer one two three four",
]


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function of the same keywords as ``Tokenizer``, over a fresh backend each time."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    source = backend.to_str()

    def make(**options) -> Tokenizer:
        settings = {"eos_id": 0, "stop_ids": (2,), "chat_template": CHATML} | options
        return Tokenizer(tokenizers.Tokenizer.from_str(source), **settings)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer) -> Tokenizer:
    return make_tokenizer()
