"""Python in a process of its own, where Triton compiles instead of interpreting."""

from __future__ import annotations

import os
import subprocess
import sys


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, without TRITON_INTERPRET, which Triton reads as it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=230)
