"""Backends of the suites of products (tests/kernels/backends.py)."""

import pytest
from jax.experimental import pallas as pl

from atd.kernels import matmul as kernels
from tests.kernels.backends import Emulated
from tests.kernels.ptx.pallas import emulated_pallas_call


@pytest.fixture
def backend(request, monkeypatch) -> str:
    if request.param == "triton-ptx":
        monkeypatch.setattr(pl, "pallas_call", emulated_pallas_call("A10"))
        monkeypatch.setitem(kernels.BACKENDS, "triton-ptx", Emulated())
    return request.param
