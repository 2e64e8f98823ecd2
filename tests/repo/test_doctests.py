"""Every example in a docstring of edgejax is found, runs, and says what it shows."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import edgejax
import edgejax.kernels

# edgejax.kernels lies in a folder of its own, where a walk of edgejax's folder does not come by.
MODULES = sorted(
    {
        module.name
        for package in (edgejax, edgejax.kernels)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        if not module.name.endswith("__main__")  # importing it is running it
    }
)
WITHOUT_EXAMPLES = {"edgejax.data.batch"}  # of edgejax.data, the room that people call from their own scripts


def examples_of(name: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    found = examples_of(name)
    # Behind a decorator (jit, custom_vjp) doctest sees no function and passes its examples over.
    written = re.findall(r"^ *>>> ", inspect.getsource(importlib.import_module(name)), re.M)
    assert sum(len(test.examples) for test in found) == len(written)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.quick
def test_modules_of_data_have_examples():
    names = {name for name in MODULES if name.startswith("edgejax.data.")}
    assert {name for name in names if not any(t.examples for t in examples_of(name))} == WITHOUT_EXAMPLES


@pytest.mark.quick
def test_every_room_is_walked():
    rooms = {name.split(".")[1] for name in MODULES}
    assert {
        "core",
        "quant",
        "kernels",
        "models",
        "weights",
        "data",
        "losses",
        "train",
        "measure",
        "cli",
    } <= rooms
