"""Every example in the docstrings of edgejax.data runs and says what it shows."""

import doctest
import importlib
import pkgutil

import pytest

import edgejax.data

MODULES = [f"edgejax.data.{module.name}" for module in pkgutil.iter_modules(edgejax.data.__path__)]
WITHOUT_EXAMPLES = {"edgejax.data.batch"}


@pytest.mark.quick
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert (result.attempted == 0) == (name in WITHOUT_EXAMPLES)
