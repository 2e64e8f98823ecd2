"""Who may import whom. A room imports itself and the rooms named beside it, nothing else of the project."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOW = {"core"}
MAY_IMPORT = {
    "core": set(),
    "quant": LOW,
    "data": LOW,
    "measure": LOW,
    "devices": LOW,
    "kernels": LOW | {"quant"},
    "losses": LOW | {"quant", "kernels", "data"},
    "optim": LOW | {"quant"},
    "memory": LOW | {"quant", "kernels"},
    "models": LOW | {"quant", "kernels", "losses", "data", "memory"},
    "weights": LOW | {"quant", "data", "models"},
    "train": LOW | {"quant", "kernels", "losses", "data", "models", "measure", "optim", "memory"},
}
MAY_IMPORT["plan"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["package"] = set(MAY_IMPORT)  # edgejax/__init__.py, on first use of a name
NAMES_OF_PACKAGE = {"__version__"}  # what a room may take from edgejax itself


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "kernels"
    if len(parts) == 2:
        return "cli" if parts[1] == "__main__.py" else "package"
    return parts[1]


def imported_modules(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in the file, ``from a import b`` as ``a.b``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [
                (node.lineno, "." * node.level + f"{node.module or ''}.{alias.name}") for alias in node.names
            ]
    return found


def forbidden(room: str, modules: list[tuple[int, str]]) -> list[str]:
    problems = []
    for line, name in modules:
        first, *rest = name.split(".")
        if first == "":
            problems.append(f"line {line}: relative import; write the whole name")
        elif first == "kernels":
            problems.append(
                f"line {line}: imports kernels; the name is edgejax.kernels (a second module otherwise)"
            )
        elif first == "edgejax":
            other = rest[0] if rest else ""
            if other in MAY_IMPORT:
                if other != room and other not in MAY_IMPORT[room]:
                    problems.append(f"line {line}: {room} may not import {other}")
            elif room != "cli" and other not in NAMES_OF_PACKAGE:
                problems.append(f"line {line}: {room} takes {name} from the package; import it from its room")
    return problems


@pytest.mark.parametrize("path", python_files("edgejax", "kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    assert forbidden(room_of(path), modules) == []


@pytest.mark.parametrize("path", python_files("tests"), ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_import_kernels_by_its_package_name(path):
    modules = imported_modules(ast.parse(path.read_text(encoding="utf-8")))
    assert not [entry for entry in modules if entry[1].split(".")[0] == "kernels"]


def test_every_room_is_in_the_table():
    rooms = {p.name for p in (ROOT / "edgejax").iterdir() if (p / "__init__.py").exists()} | {"kernels"}
    assert rooms == set(MAY_IMPORT) - {"package"}


@pytest.mark.parametrize(
    ("room", "source", "n_problems"),
    [
        ("core", "import edgejax.quant", 1),
        ("core", "def f():\n    from edgejax.quant import pack", 1),
        ("weights", "from edgejax import train", 1),
        ("train", "import edgejax.weights.load as w", 1),
        ("models", "import kernels", 1),
        ("models", "from kernels.attention import attention", 1),
        ("models", "from . import config", 1),
        ("train", "from edgejax import finetune", 1),
        ("train", "from edgejax import __version__", 0),
        ("models", "from edgejax.kernels.attention import attention\nimport numpy, edgejax.models.lora", 0),
        ("cli", "import edgejax\nfrom edgejax.weights import load_model", 0),
    ],
)
def test_the_rule_itself(room, source, n_problems):
    assert len(forbidden(room, imported_modules(ast.parse(source)))) == n_problems
