"""The public API: importing is silent and light, and every public name is explained."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import edgejax

ROOMS = ("core", "quant", "kernels", "models", "weights", "data", "losses", "train", "measure", "devices")
PACKAGES = ["edgejax", *(f"edgejax.{room}" for room in ROOMS)]


def public_objects(package: str) -> list[tuple[str, object]]:
    """(name, object) of the functions and classes of edgejax that the package re-exports."""
    module = importlib.import_module(package)
    things = [
        (f"{package}.{name}", getattr(module, name)) for name in dir(module) if not name.startswith("_")
    ]
    return [
        (name, thing)
        for name, thing in things
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__.startswith("edgejax")
    ]


def test_import_touches_no_backend_and_prints_nothing():
    program = (
        "import sys, edgejax\n"
        "if 'jax' in sys.modules:\n"
        "    from jax._src import xla_bridge\n"
        "    assert not xla_bridge.backends_are_initialized(), 'a back end was started'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.quick
@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_and_classes_have_docstrings(package):
    assert [name for name, thing in public_objects(package) if not _own_docstring(thing)] == []


@pytest.mark.quick
def test_every_lazy_name_resolves_and_unknown_names_do_not():
    for name in edgejax.__all__:
        assert getattr(edgejax, name) is not None
    assert set(edgejax.__all__) <= set(dir(edgejax))
    with pytest.raises(AttributeError, match="no_such_thing"):
        edgejax.no_such_thing  # noqa: B018  the access is the test


@pytest.mark.quick
def test_type_checkers_see_the_same_names_from_the_same_places():
    block = next(n for n in ast.parse(inspect.getsource(edgejax)).body if isinstance(n, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == edgejax._HOMES


@pytest.mark.quick
def test_every_module_imports():
    for module in pkgutil.walk_packages(edgejax.__path__, "edgejax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.mark.quick
def test_kernels_is_inside_the_package():
    import edgejax.kernels

    assert edgejax.kernels.__name__ == "edgejax.kernels"


def _own_docstring(thing) -> bool:
    doc = inspect.getdoc(thing) or ""
    generated = inspect.isclass(thing) and doc.startswith(
        f"{thing.__name__}("
    )  # dataclasses and named tuples
    return bool(doc) and not generated
