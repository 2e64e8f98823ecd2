"""The files of the repository: their sizes, the packages they make, what they may not mention."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 700
TEXT_SUFFIXES = {".py", ".md", ".toml", ".cff", ".yml", ".yaml", ".sh", ".txt", ".cfg", ".json", ".jsonl", ""}
# A path of one machine, or the address of a registry: the first works nowhere else, the second not everywhere.
MACHINE_PATH = re.compile(
    r"(?<![\w./])/(work|home|root|opt|Users|mnt|data|scratch)/\w|(?<![\w./])/tmp/\w|C:\\\\?Users"
    r"|pypi\.org|pythonhosted\.org|download\.pytorch\.org|deb\.debian\.org|registry\.npmjs"
)


def tracked_files() -> list[Path]:
    """What belongs to the repository: git's list, or every file that is no product of a build without git."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout.split("\0")  # fmt: skip
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        skip = (".git", ".venv", "build", "dist", "runs", "__pycache__", ".egg-info", "_cache", ".hypothesis")
        files = [
            p for p in ROOT.rglob("*") if not any(part.endswith(skip) for part in p.relative_to(ROOT).parts)
        ]
    return sorted(p for p in files if p.is_file())


TEXT_FILES = [p for p in tracked_files() if p.suffix in TEXT_SUFFIXES]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in TEXT_FILES if p.suffix == ".py"], ids=relative)
def test_file_is_short(path):
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines < MAX_LINES, f"{n_lines} lines; split it by concept"


@pytest.mark.parametrize("path", [p for p in TEXT_FILES if p != Path(__file__).resolve()], ids=relative)
def test_file_names_no_machine_and_no_host(path):
    text = path.read_text(encoding="utf-8")
    found = [
        f"line {text.count(chr(10), 0, m.start()) + 1}: {m.group()}" for m in MACHINE_PATH.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["see /home/me/x", '"/tmp/abc"', "a\n/work/main", "https://pypi.org/simple"])
def test_machine_paths_are_recognised(text):
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["~/.cache/edgejax", "runs/tmp/x", "a/home/b", "/sys/class/thermal", "tmp_path / 'work'"]
)
def test_other_paths_are_not(text):
    assert not MACHINE_PATH.search(text)


def test_package_list_is_the_folders():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = pyproject["tool"]["setuptools"]
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "edgejax").rglob("__init__.py")}
    kernels = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "kernels").rglob("__init__.py")}
    assert sorted(setuptools["packages"]) == sorted(folders | {f"edgejax.{name}" for name in kernels})
    assert setuptools["package-dir"] == {"edgejax": "edgejax", "edgejax.kernels": "kernels"}


def test_every_folder_of_python_is_a_package():
    bare = {
        relative(p.parent)
        for p in tracked_files()
        if p.suffix == ".py"
        and relative(p).startswith(("edgejax/", "kernels/"))
        and not (p.parent / "__init__.py").exists()
    }
    assert bare == set()


def test_init_files_only_re_export():
    """An ``__init__.py`` of a room holds a docstring, imports and ``__all__``; the package's own is tested apart."""
    import ast

    for path in [*(ROOT / "edgejax").glob("*/**/__init__.py"), *(ROOT / "kernels").rglob("__init__.py")]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            is_import = isinstance(node, ast.Import | ast.ImportFrom)
            assert is_docstring or is_all or is_import, f"{relative(path)} line {node.lineno}"


def test_versions_agree():
    import edgejax

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert pyproject["version"] == edgejax.__version__
    assert re.search(r"^version: (.*)$", citation, re.M).group(1).strip("\"'") == edgejax.__version__
    assert re.search(r"^## (\d\S*)", changelog, re.M).group(1) == edgejax.__version__
