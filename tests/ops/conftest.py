from __future__ import annotations

import pytest

from tests.ops.emulator import Emulator
from tests.ops.table import EMULATED


@pytest.fixture
def counting():
    """The emulator with its counters on and at zero."""
    if not EMULATED:
        pytest.skip("counters belong to the emulated backend")
    emulator = Emulator()
    emulator.configure("COUNT", "1")
    emulator.reset_counters()
    yield emulator
    emulator.configure("COUNT", "")
