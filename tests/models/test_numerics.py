"""What keys say about the settings under which results were computed."""

import jax

from atd.models.numerics import numerics


def test_settings_that_change_bits_are_told_apart(monkeypatch):
    before = numerics()
    assert before["platform"] == "cpu"
    assert numerics() == before
    with jax.enable_x64(True):
        assert numerics() != before
    with jax.default_matmul_precision("bfloat16"):
        assert numerics() != before
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    assert numerics() != before
