"""The table of devices: sourced, found by name, and what of a phone's memory an app gets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.core.errors import ConfigError
from edgejax.devices import device_profiles, find_device, is_budget, parse_budget
from edgejax.devices.profile import APP_SHARE_HIGH, APP_SHARE_LOW, GIB, KINDS

pytestmark = pytest.mark.quick


def test_every_row_is_of_a_kind_has_a_source_and_a_name_of_its_own():
    profiles = device_profiles()
    assert {profile.kind for profile in profiles} == set(KINDS)
    assert all(profile.source for profile in profiles)
    assert len({profile.name for profile in profiles}) == len(profiles)
    for profile in profiles:
        assert find_device(profile.name) is profile


def test_cards_have_memory_bandwidth_and_a_peak():
    for card in (profile for profile in device_profiles() if profile.kind == "gpu"):
        assert None not in (card.memory_bytes, card.bandwidth_gb_per_s, card.gpu_gflop_per_s), card.name
        assert 4 * GIB <= card.memory_bytes <= 80 * GIB
        assert 100 < card.bandwidth_gb_per_s < 4000


def test_what_an_app_gets_of_a_phone_is_a_range_and_a_report_where_there_is_one():
    phones = [p for p in device_profiles() if p.kind == "phone" and p.memory_bytes]
    reported = [p for p in phones if p.app_memory_reported]
    assert len(reported) >= 5
    for phone in phones:
        low, high = phone.app_memory_bytes
        assert 0 < low <= high < phone.memory_bytes
        if not phone.app_memory_reported:
            assert (low, high) == (
                round(APP_SHARE_LOW * phone.memory_bytes),
                round(APP_SHARE_HIGH * phone.memory_bytes),
            )
    lowest = [phone.app_memory_bytes[0] / phone.memory_bytes for phone in reported]
    assert min(lowest) == pytest.approx(APP_SHARE_LOW, abs=1e-3)
    assert max(lowest) == pytest.approx(APP_SHARE_HIGH, abs=1e-3)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("rtx3060", "NVIDIA GeForce RTX 3060 12 GB"),
        ("RTX 3060 Ti", "NVIDIA GeForce RTX 3060 Ti"),
        ("geforce-rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("rtx3050-8gb", "NVIDIA GeForce RTX 3050 8 GB"),
        ("pixel_7a", "Google Pixel 7a"),
        ("iPhone 13 pro", "iPhone 13 Pro"),
    ],
)
def test_names_as_people_write_them(said, name):
    assert find_device(said).name == name


def test_a_name_of_two_or_of_none_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match="one of several: NVIDIA GeForce RTX 3050 6 GB, NVIDIA GeForce RTX 3050 8"
    ):
        find_device("rtx 3050")
    with pytest.raises(ConfigError, match=r"one of several: .*4060 Ti 16 GB, .*4060 Ti 8 GB"):
        find_device("rtx4060ti")
    with pytest.raises(ConfigError, match=r"no device named 'rtx3061'; the nearest names: .*RTX 3060"):
        find_device("rtx3061")
    with pytest.raises(ConfigError, match="no device named ''"):
        find_device("")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600MB", 600e6),
        ("1.2 gb", 1.2e9),
        ("512MiB", 2**29),
        (" 1GiB ", 2**30),
        (".5GB", 5e8),
        ("64 kB", 64e3),
    ],
)
def test_budgets(text, size):
    assert parse_budget(text) == size
    assert is_budget(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("600", "has no unit; write 600MB or 600GB"),
        ("600 potatoes", "unknown unit; there are: kB, MB"),
        ("0MB", "no amount that a memory could have"),
        ("9" * 400 + "GB", "no amount that a memory could have"),
        ("-3GB", "not an amount"),
        ("lots", "not an amount"),
        ("1,2GB", "not an amount"),
        ("nanGB", "not an amount"),
        ("", "not an amount"),
    ],
)
def test_what_is_no_budget_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_budget(text)


@given(st.integers(1, 10**6), st.sampled_from(["kB", "MB", "GB", "KiB", "MiB", "GiB"]))
def test_whole_amounts_are_exact(number, unit):
    base = 1024 if "i" in unit else 1000
    assert parse_budget(f"{number}{unit}") == number * base ** ("kmg".index(unit[0].lower()) + 1)
