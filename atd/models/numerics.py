"""What decides on the bits of results, besides code, inputs and options."""

import os
from typing import Any

import jax
from jaxlib import version as jaxlib

from atd.version import __version__


def numerics() -> dict[str, str]:
    """Returns the versions, the platform and the settings of jax that change what is computed.

    They are part of every key under which results are kept, so that a run under other settings
    does not go on with them.
    """
    settings = (
        "jax_enable_x64",
        "jax_default_matmul_precision",
        "jax_default_prng_impl",
        "jax_threefry_partitionable",
        "jax_numpy_dtype_promotion",
        "jax_numpy_rank_promotion",
    )
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": jax.default_backend(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **{name: str(getattr(jax.config, name, None)) for name in settings},
    }


def surroundings() -> dict[str, Any]:
    """Returns what has to be the same in all processes that compute one result."""
    here = jax.local_devices()
    devices = f"{len(here)} x {here[0].device_kind}"
    return {
        "version of atd": __version__,
        "devices": devices,
        "number of cores": os.cpu_count(),
    } | {f"setting of {name}": value for name, value in numerics().items()}
