"""What tests of calibration share."""

import numpy as np
import pytest

from atd.calibration import room


@pytest.fixture
def exact_streams(monkeypatch):
    """Residual streams in float32, whose moments can be compared closely."""
    monkeypatch.setattr(room, "STREAM", np.dtype(np.float32))
