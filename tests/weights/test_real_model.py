"""SmolLM2-135M-Instruct from its wheel: values, tokens, training and memory, against code that is not ours."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgejax.data import load_documents
from edgejax.models import LoraConfig, generate
from edgejax.models.generate import encode_prompt
from edgejax.train import TrainSettings
from edgejax.weights import load_model, resolve
from edgejax.weights.form import wide
from edgejax.weights.gguf_file import open_gguf

PACKED_MB = 96.6  # 92.1 MiB of codes, scales and norms


@pytest.fixture(scope="module")
def path():
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def model(path):
    return load_model("smollm2-135m")


def test_config_and_forms(model):
    config = model.config
    assert (config.family, config.n_layers, config.d_model, config.d_ff) == ("llama", 30, 576, 1536)
    assert (config.n_heads, config.n_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope_theta, config.norm_eps, config.max_position) == (100_000.0, 1e-5, 8192)
    assert config.tie_embeddings
    assert config.n_params() == 134_515_008
    assert model.params["blocks"]["q_proj"]["kernel"].bits == 4
    assert model.params["embed"]["table"].bits == 8
    assert model.notes == ()


@pytest.mark.parametrize(("ours", "theirs", "heads"), [("up_proj", "ffn_up", 0), ("k_proj", "attn_k", 3)])
def test_values_are_those_of_gguf(model, path, ours, theirs, heads):
    file = open_gguf(path)
    for layer in (0, 29):
        tensor = file.tensor(f"blk.{layer}.{theirs}.weight")
        expected = gguf.quants.dequantize(file.read_rows(tensor, 0, tensor.n_rows), tensor.type)
        if heads:  # llama.cpp stores rotary pairs side by side
            expected = (
                expected.reshape(heads, -1, 2, expected.shape[-1]).swapaxes(1, 2).reshape(expected.shape)
            )
        np.testing.assert_array_equal(wide(model.params["blocks"][ours]["kernel"][layer]), expected)


TEXTS = [
    "Hello world!  Two  spaces\n\n\ttabs  and trailing   ",
    "def f(a, *b):\n    return a**2 + 12345 // 7  # comment\n\n\nclass A: pass",
    "na\u00efve caf\u00e9 \u2014 \u6771\u4eac \U0001f642 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628\u064a a\u0301",
    "I don't; you'LL, we've. THE'S 's",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "x" * 300,
    "",
    "   ",
    "\r\n\x00\x07 \u200b\u00a0",
]


@pytest.mark.slow  # transformers takes 25 s to read the file's vocabulary
def test_the_same_tokens_as_transformers(model, path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    ours = model.tokenizer
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids, skip_special=False) == text
    chat = [{"role": "user", "content": "What is a list?"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(chat, add_generation_prompt=True) == rendered
    assert ours.eos_id == theirs.eos_token_id == 2
    assert 2 in ours.stop_ids


@pytest.fixture(scope="module")
def theirs(path):
    """The model of the same file as transformers reads it (its own code all the way), float32."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    torch.set_num_threads(1)  # as in helpers/oracle.py
    made = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return made.eval()


PROMPTS = [
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}],
]


@pytest.mark.slow  # transformers takes 25 s to read the file
def test_48_greedy_tokens_are_those_of_transformers(model, theirs):
    """Each token, made with the cache, is the one that transformers finds likeliest after those before it."""
    torch = pytest.importorskip("torch")
    for prompt in PROMPTS:
        ours = generate(model, prompt, max_tokens=48, stop=())
        start = encode_prompt(model.tokenizer, prompt)
        assert (ours.prompt_tokens, len(ours.tokens)) == (len(start), 48)
        with torch.no_grad():
            logits = theirs(torch.tensor([[*start, *ours.tokens]])).logits[0]
        expected = logits.argmax(-1)[len(start) - 1 : -1].tolist()
        assert list(ours.tokens) == expected, prompt
        assert len(set(expected)) > 12  # a text, not a loop


@pytest.mark.slow  # as above
def test_five_steps_of_training_follow_torch_and_peft(model, theirs):
    """Loss by loss, from 4-bit weights here and their float32 values there."""
    pytest.importorskip("peft")
    from helpers import curves, oracle

    settings = TrainSettings(steps=5, learning_rate=2e-3, warmup=2, weight_decay=0.1)
    document = max(load_documents("python-reference", model.tokenizer), key=lambda d: len(d.tokens))
    rows = document.tokens[: 5 * 128].astype(int).reshape(5, 1, 128)
    batches = [(tokens, tokens) for tokens in rows]
    wrapped = oracle.with_peft(theirs, rank=8, alpha=16.0, b_std=0.0)
    start = oracle.adapters_of(wrapped)
    expected, expected_norms, expected_end = curves.their_run(wrapped, settings, batches)
    wrapped.unload()
    losses, norms, end = curves.our_run(model.config, model.params, start, LoraConfig(), settings, batches)
    # Measured: 9e-6, 1e-4 and 0.011 (Adam's first steps are signs, and a gradient near zero has none).
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-3)
    assert curves.distance(end, expected_end, start) < 0.05


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of peak memory")
def test_loading_adds_its_packed_size_to_the_process_and_little_more(path):
    """Peak resident memory of a fresh process, before and after."""
    script = """
import re, sys, jax
from edgejax.weights import load_model

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

jax.devices()
before = peak_kib()
model = load_model(sys.argv[1], need_tokenizer=sys.argv[2] == "tokenizer")
print(peak_kib() - before)
"""
    for what, allowance_mb in (("weights", 16), ("tokenizer", 48)):
        done = subprocess.run(
            [sys.executable, "-c", script, str(path), what], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) * 1024 < (PACKED_MB + allowance_mb) * 1e6
