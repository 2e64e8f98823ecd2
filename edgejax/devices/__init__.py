"""Devices that are not here, by name, and amounts of memory."""

from edgejax.devices.budget import is_budget, parse_budget
from edgejax.devices.profile import DeviceProfile, device_profiles, find_device

__all__ = ["DeviceProfile", "device_profiles", "find_device", "is_budget", "parse_budget"]
