"""What the documents tell a person to type is what the program takes."""

import argparse
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from edgejax.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELL, PYTHON = {"sh", "bash", "shell", "console"}, {"python", "py"}
# Programs a reader has; their own arguments are their own business.
OTHERS = {"git", "cd", "pip", "python3", ".ci/run", "export", "nvidia-smi", "cat", "ls", "pytest"}


class Block(NamedTuple):
    document: str
    line: int
    language: str
    text: str


def fenced_blocks(document: str, text: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.M | re.S)
    return [Block(document, text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in found]


BLOCKS = [b for path in DOCUMENTS for b in fenced_blocks(path.name, path.read_text(encoding="utf-8"))]


def commands(block: Block) -> list[list[str]]:
    """The words of each command: prompts, comments, leading assignments and line continuations taken away."""
    joined = block.text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue  # output
        lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;<>"):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
                words = []
            else:
                words.append(word)
    return found


def complaint(words: list[str], parser: argparse.ArgumentParser, targets: set[str]) -> str | None:
    """Why a command would not start, or None."""
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program in ("python", "python3") and rest[:2] == ["-m", "edgejax"]:
        program, rest = "edgejax", rest[2:]
    if program == "make":
        unknown = [
            word for word in rest if "=" not in word and not word.startswith("-") and word not in targets
        ]
        return f"no make target {unknown}" if unknown else None
    if program == "edgejax":
        try:
            parser.parse_args(rest)
        except SystemExit as stop:
            return None if stop.code == 0 else f"edgejax does not take {shlex.join(rest)}"
        return None
    return None if program in OTHERS else f"unknown program {program}"


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return build_parser()


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in SHELL], ids=lambda b: f"{b.document}:{b.line}"
)
def test_commands_in_documents_parse(block, parser, targets):
    found = commands(block)
    assert found, "a shell block without a command"
    assert [c for words in found if (c := complaint(words, parser, targets))] == []


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in PYTHON], ids=lambda b: f"{b.document}:{b.line}"
)
def test_python_in_documents_compiles(block):
    compile(block.text, f"{block.document}:{block.line}", "exec")


def test_every_block_says_its_language():
    assert [(b.document, b.line) for b in BLOCKS if not b.language] == []


def test_readme_shows_the_commands_that_matter(parser):
    words = [w for b in BLOCKS if b.document == "README.md" and b.language in SHELL for w in commands(b)]
    assert ["make", "finetune"] in words
    assert ["make", "test"] in words
    shown = {w[1] for w in words if w[0] == "edgejax" and len(w) > 1}
    subparsers = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    assert set(subparsers.choices) <= shown


@pytest.mark.parametrize(
    ("line", "is_good"),
    [
        ("edgejax finetune --no-such-flag 3", False),
        ("edgejax nothing", False),
        ("make nothing", False),
        ("unheard-of --flag", False),
        ("X=1 make test && edgejax doctor", True),
        ("python -m edgejax --help", True),
    ],
)
def test_the_check_itself(line, is_good, parser, targets, capsys):
    words = commands(Block("x", 1, "sh", line + "\n"))
    assert all(complaint(w, parser, targets) is None for w in words) is is_good
