"""What both backends with kernels share: which GPUs and weights they refuse, the layouts they read,
the self-test."""

import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atd.errors import BadInput, RunFailed
from atd.kernels import packed as packed_backends
from atd.kernels.matmul import PACKED, matmul
from atd.kernels.mosaic.backend import Mosaic
from atd.kernels.triton.backend import Triton
from atd.weights import Dense, Packed
from tests.kernels.matrices import activations, packed


@pytest.mark.parametrize("backend", ["triton-interpret", "mosaic-interpret"])
@pytest.mark.parametrize(
    ("weight", "dtype", "reason"),
    [
        ({"layout": "bit-ttt"}, "float32", r"packed in layout tiles, words, .* use backend 'xla'"),
        ({"bases": 5}, "float32", "up to 4 bases, not 5; backend 'xla' multiplies any"),
        ({}, "int32", "float32, bfloat16 or float16, not int32"),
    ],
)
def test_refusals_name_the_reason_and_the_backend_that_could(backend, weight, dtype, reason):
    x = activations(1, 64).astype(dtype)
    with pytest.raises(BadInput, match=rf"'{backend}' cannot multiply x {dtype}.*: it .*{reason}"):
        matmul(x, packed(4, 64, **weight), backend=backend)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_a_cpu_is_refused(backend):
    reason = "needs an NVIDIA GPU and this process runs on cpu; backend 'xla' runs there"
    with pytest.raises(BadInput, match=reason):
        matmul(activations(1, 64), packed(4, 64), backend=backend)


@pytest.mark.parametrize(
    ("backend", "capability", "refused"),
    [
        (Triton(), "7.5", "NVIDIA something has compute capability 7.5 and Triton needs 8.0"),
        (Triton(), "8.0", None),
        (Triton(), "12.0", None),  # not less than "8.0", though the text is
        (Mosaic(), "8.9", "8.9 and Mosaic's kernels need 9.0"),
        (Mosaic(), "9.0", None),
        (Mosaic(), "10.0", "10.0 and Mosaic's kernels need 9.0"),
    ],
)
def test_gpus_that_cannot_run_the_kernels_are_refused(monkeypatch, backend, capability, refused):
    class Device:
        platform, device_kind, compute_capability = "gpu", "NVIDIA something", capability

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    reason = backend.device_refuses()
    assert reason is None if refused is None else refused in (reason or "")


# --- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", packed_backends.READABLE)
@pytest.mark.parametrize("backend", [Triton(), Mosaic()])
def test_prepare_makes_the_layout_that_is_read_where_it_lies(backend, layout):
    weight = packed(20, 333, bases=3, layout=layout)
    wanted = packed(20, 333, bases=3, layout=backend.layout)
    for form in (np.asarray, jnp.asarray):
        held = backend.prepare(jax.tree.map(form, weight))
        assert isinstance(held, Packed)
        assert held.type == wanted.type
        np.testing.assert_array_equal(held.codes, wanted.codes)


@pytest.mark.parametrize("backend", [Triton(), Mosaic()])
def test_prepare_leaves_alone_what_is_not_read(backend):
    read = packed(20, 333, layout=backend.layout)
    for weight in (read, Dense(np.ones((3, 4))), packed(4, 64, layout="bit-ttt")):
        assert backend.prepare(weight) is weight


def test_prepare_of_words_keeps_the_bytes_of_wide_rows():
    aligned = jax.tree.map(np.asarray, packed(4, 4096, layout="aligned"))
    held = packed_backends.prepare(aligned, "words")
    assert held.type.nbytes == aligned.type.nbytes
    assert np.shares_memory(held.codes, aligned.codes)


# --- self-test --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(packed_backends.Backend):
    """Computes something else for three bases."""

    name = "wrong"

    def multiply(self, x, weight):
        y = x @ weight.dequantize().T
        return y + 1 if weight.type.ternary.bases == 3 else y


@pytest.fixture
def asked(monkeypatch):
    """The kinds of weights that the self-test was asked for, on what seems to be a GPU."""
    found = []
    right = packed_backends.largest_difference

    def difference(multiply, bases, tied):
        found.append((bases, tied))
        return right(multiply, bases, tied)

    monkeypatch.setattr(packed_backends, "largest_difference", difference)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    packed_backends.self_test.cache_clear()
    yield found
    packed_backends.self_test.cache_clear()


def test_the_first_product_of_each_kind_is_preceded_by_a_self_test(asked):
    x = activations(1, 64)
    for bases, tied in ((1, True), (1, True), (2, False)):
        Wrong().matmul(x, packed(4, 64, bases, tied=tied))
    assert asked == [(1, True), (2, False)]
    with pytest.raises(RunFailed, match=r"'wrong' computes wrong results .* N = 3, tied, off by "):
        Wrong().matmul(x, packed(4, 64, 3))
    with pytest.raises(RunFailed, match="use backend 'xla'"):  # again: it stays wrong
        Wrong().matmul(x, packed(4, 64, 3))
    Wrong(interpret=True).matmul(x, packed(4, 64, 4))
    assert (4, True) not in asked  # jax's interpreter is not tested


def test_the_self_test_runs_while_a_program_is_traced(asked):
    """As on a GPU, where the first product of a model asks for it: nothing of that trace may reach
    its kernels."""

    @jax.jit
    def model(x):
        return Wrong().matmul(x, packed(4, 64, 1))

    assert model(activations(1, 64)).shape == (1, 4)
    assert asked == [(1, True)]


def test_no_backend_needs_another():
    """Each can be deleted: what they share is in files that import none."""
    folder = Path(packed_backends.__file__).parent
    assert set(PACKED) == {"cpu", "triton", "triton-interpret", "mosaic", "mosaic-interpret"}
    shared = [folder / name for name in ("prefixes.py", "packed.py", "settings.py", "xla.py")]
    for paths, others in (
        (shared, "triton|mosaic|cpu"),
        (folder.glob("mosaic/*.py"), "triton|cpu"),
        (folder.glob("triton/*.py"), "mosaic|cpu"),
        (folder.glob("cpu/*.py"), "triton|mosaic"),
    ):
        for path in paths:
            imports = rf"^\s*(from|import) atd\.kernels\.({others})\b"
            assert not re.search(imports, path.read_text(), re.MULTILINE), path
