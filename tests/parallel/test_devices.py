"""Several devices: this process has one, so the tests of FILES run in another."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from atd.errors import BadInput
from atd.parallel.devices import devices_of, make_mesh

FILES = ("on_eight_devices.py", "spread_conversions.py")
EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_devices(marked):
    flags = f"{os.environ.get('XLA_FLAGS', '')} {EIGHT}"
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marked, *files],
        env=os.environ
        | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "ATD_OUTER_CACHE": os.environ["ATD_CACHE"]},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("names", "said"), [(("data", "tensor"), "the axes 'tensor'")])
def test_a_mesh_with_other_axes_is_refused(names, said):
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), names)
    with pytest.raises(BadInput, match=f"the mesh has {said}; a model runs on the axes 'model'"):
        devices_of(mesh)


def test_one_axis_will_do():
    for name in ("data", "model"):
        devices = devices_of(Mesh(np.asarray(jax.devices()[:1]), (name,)))
        assert (devices.data, devices.model) == (1, 1)


def test_numbers_of_devices_that_cannot_be():
    assert make_mesh() is None
    with pytest.raises(BadInput, match="this process has 1"):
        make_mesh(2)
    with pytest.raises(BadInput, match="--devices 3 is no multiple of --tensor-parallel 2"):
        make_mesh(2, 3)
