"""How text on the command line is read."""

import argparse

import pytest

from edgejax.cli import options
from edgejax.core.errors import ConfigError

pytestmark = pytest.mark.quick


def test_names_are_split_at_commas():
    assert options.names("q_proj, v_proj,q_proj,") == ("q_proj", "v_proj")


@pytest.mark.parametrize(("text", "value"), [("none", None), ("None", None), ("0.5", 0.5), ("2", 2.0)])
def test_number_or_none(text, value):
    assert options.number_or_none(text) == value


def test_whole_numbers_fit_32_bits():
    assert options.whole_number("-2147483647") == -(2**31) + 1
    with pytest.raises(argparse.ArgumentTypeError, match="2147483648 is out of range; at most 2147483647"):
        options.whole_number("2147483648")
    with pytest.raises(ConfigError, match=r"3 rows of 1000000000 positions .* smaller --batch or --seq"):
        options.check_step_size(3, 10**9)


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("0.1", 0.1), ("0", 0)])
def test_steps_stay_whole_and_shares_do_not(text, value):
    read = options.steps_or_share(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "pair"),
    [("b2=0.95", ("b2", 0.95)), ("nesterov=true", ("nesterov", True)), ("mode=fast", ("mode", "fast"))],
)
def test_key_value_reads_json_values(text, pair):
    assert options.key_value(text) == pair


@pytest.mark.parametrize("text", ["b2", "=3", ""])
def test_key_value_needs_both(text):
    with pytest.raises(argparse.ArgumentTypeError, match="name=value"):
        options.key_value(text)


def test_a_run_folder_stands_for_its_adapter(tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    assert options.adapter_folder(run) == run / "adapter"
    (run / "adapter_config.json").touch()
    assert options.adapter_folder(run) == run
    assert options.adapter_folder(tmp_path / "missing") == tmp_path / "missing"
