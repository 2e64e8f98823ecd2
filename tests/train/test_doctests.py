"""Every example in the docstrings of edgejax.train runs and says what it shows."""

import doctest
import importlib
import pkgutil

import pytest

import edgejax.train

MODULES = [f"edgejax.train.{module.name}" for module in pkgutil.iter_modules(edgejax.train.__path__)]


@pytest.mark.quick
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
