"""The tokenizer of a Hugging Face folder: tokenizer.json and what lies beside it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from edgejax.core.errors import WeightsError
from edgejax.data.tokenizer import Tokenizer
from edgejax.weights.gguf_tokenizer import STOP_TEXTS
from edgejax.weights.hf_config import read_json


def hf_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.

    Raises:
      WeightsError: there is no tokenizer.json, or it is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise WeightsError(
            f"{folder}: no tokenizer.json; save the tokenizer with `AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(folder)`"
        )
    try:
        text = path.read_text(encoding="utf-8")
        backend = Backend.from_str(text)
    except Exception as error:  # tokenizers raises plain Exception for every malformed file
        raise WeightsError(f"{path}: not a tokenizer ({error}); download it again") from error
    settings = _optional(folder / "tokenizer_config.json")
    model, generation = _optional(folder / "config.json"), _optional(folder / "generation_config.json")
    ids = {name: _token_id(backend, settings, model, name, folder) for name in ("bos", "eos", "pad")}
    eos_lists = [_ids(generation, "eos", folder), _ids(model, "eos", folder)]
    named = [ids["eos"], *eos_lists[0], *eos_lists[1], *(_special_id(backend, text) for text in STOP_TEXTS)]
    stops = [i for i in named if i is not None and _is_token(backend, i)]
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        stop_ids=tuple(dict.fromkeys(stops)),
        add_bos=_adds_bos(backend, settings, ids["bos"]),
        chat_template=_chat_template(folder, settings),
    )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids(settings: dict[str, Any], name: str, folder: Path) -> list[int]:
    value = settings.get(f"{name}_token_id")
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) for i in listed):
        raise WeightsError(
            f"{folder}: {name}_token_id is {value!r}; it must be a whole number, or a list of them"
        )
    return listed


def _is_token(backend: Backend, token_id: int) -> bool:
    return 0 <= token_id < 2**31 and backend.id_to_token(token_id) is not None


def _token_id(backend: Backend, settings: dict, model: dict, name: str, folder: Path) -> int | None:
    """From the tokenizer's settings; where they do not name the token, from the model's."""
    if f"{name}_token" in settings:
        token = settings[f"{name}_token"]
        text = token.get("content") if isinstance(token, dict) else token
        if text is not None and not isinstance(text, str):
            raise WeightsError(f"{folder}/tokenizer_config.json: {name}_token is {token!r}; it must be text")
        return None if text is None else backend.token_to_id(text)
    listed = _ids(model, name, folder)
    return listed[0] if listed and _is_token(backend, listed[0]) else None


def _special_id(backend: Backend, text: str) -> int | None:
    found = backend.token_to_id(text)
    added = backend.get_added_tokens_decoder()
    return found if found is not None and found in added else None


def _adds_bos(backend: Backend, settings: dict, bos_id: int | None) -> bool:
    """What tokenizer_config.json says; else whether the post-processor of tokenizer.json puts BOS first."""
    if bos_id is None:
        return False
    if isinstance(settings.get("add_bos_token"), bool):
        return settings["add_bos_token"]
    return backend.encode("", add_special_tokens=True).ids[:1] == [bos_id]


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path}: cannot be read ({error}); download it again") from error
    template = settings.get("chat_template")
    try:
        if isinstance(template, list):  # several by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template is None or isinstance(template, str):
            return template
    except (TypeError, KeyError):
        pass
    raise WeightsError(
        f"{folder}/tokenizer_config.json: chat_template is neither text nor a list of named texts"
    )
