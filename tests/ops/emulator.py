"""Settings and counters of the emulated backend."""

from __future__ import annotations

import ctypes
import json
from typing import Any

from pyvitfast import _lib


class Emulator:
    """The library that the emulated backend loaded, by its C functions."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(_lib.find_binary("_ops_emulated")))
        self.library.pyvitfast_emulator_configure.restype = ctypes.c_char_p
        self.library.pyvitfast_emulator_counters_json.restype = ctypes.c_char_p

    def configure(self, name: str, value: str) -> None:
        """Set ``PYVITFAST_EMULATOR_<name>`` for this process; an empty value returns to the environment."""
        problem = self.library.pyvitfast_emulator_configure(name.encode(), value.encode())
        assert problem is None, problem

    def reset_counters(self) -> None:
        self.library.pyvitfast_emulator_reset_counters()

    def counters(self) -> dict[str, Any]:
        """Counts by kernel since the last reset."""
        kernels: dict[str, Any] = json.loads(self.library.pyvitfast_emulator_counters_json())["kernels"]
        return kernels
