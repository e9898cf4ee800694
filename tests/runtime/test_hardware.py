"""Named hardware, and the peak of the devices at hand."""

import jax
import pytest

from looped_jax.errors import ConfigError
from looped_jax.runtime import hardware


def test_known_and_unknown_devices():
    class Known:
        device_kind = "NVIDIA H100 80GB HBM3"

    assert hardware.device_peak_flops(Known())[0] == 989e12
    measured, source = hardware.device_peak_flops(jax.devices()[0])
    assert measured > 1e8 and source == "measured float32 matmul"


def test_hardware_is_found_by_name_and_a_wrong_name_is_told_what_exists():
    assert hardware.find("H100") is hardware.HARDWARE["h100"]
    assert hardware.find("h100").peak_flops == hardware.PEAK_FLOPS["H100"]
    with pytest.raises(ConfigError, match="--hardware=tpu-v5 is unknown; did you mean tpu-v5"):
        hardware.find("tpu-v5")


@pytest.mark.parametrize("device", hardware.HARDWARE.values(), ids=lambda device: device.name)
def test_rates_are_in_the_order_that_makes_hierarchy(device):
    """A slip of a unit would show: memory is faster than links, links faster than the network."""
    assert device.memory_bandwidth > device.link > device.network
    assert 1e10 < device.memory < 1e12 and 1e14 < device.peak_flops < 1e16
