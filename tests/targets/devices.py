"""Devices to compile for: those of planning/targets.py, and pods of several slices or of v4.

Nothing runs on them. They need the compilers themselves: `make test-targets` brings them.
"""

import functools

from jax.experimental import topologies

from looped_jax.planning import targets

# Real v4 chips run their two cores as one device; so described they do.
MEGACORE = {
    "chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1), "num_slices": 1,
}  # fmt: skip


@functools.cache
def devices(name: str, *, slices: int = 1):
    """Of "h100:8" eight H100s of one host; of "v5e:2x4" a TPU slice of that shape, or several."""
    if not name.startswith("v4") and slices == 1:
        return targets.find(name).devices
    more = MEGACORE if name.startswith("v4") else {"num_slices": slices}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
