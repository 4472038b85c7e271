"""Everything that a candidate can throw as a recorded reason, and a limit on how long it may take."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from tuner.store import Outcome, Status

_KINDS: tuple[tuple[Status, tuple[str, ...]], ...] = (
    ("timeout", ("TimeoutError",)),
    ("out_of_resources", ("OutOfResources", "OutOfMemoryError", "MemoryError")),
    ("compile_error", ("CompilationError", "CompileError", "CompileException", "PTXASError", "NVRTCError")),
)
"""By the names of exception classes: naming the classes would import triton and cupy."""

_ERROR = re.compile(r"\): (catastrophic )?error\b|^ptxas (error|fatal)")


def failure(error: BaseException) -> Outcome:
    """The outcome that an exception stands for, or the one that it was raised from."""
    causes = [each for each in (error, error.__cause__) if each is not None]
    names = {kind.__name__ for each in causes for kind in type(each).__mro__}
    status: Status = "error"
    for kind, known in _KINDS:
        if names & set(known):
            status = kind
            break
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = (_complaint(lines) if status == "compile_error" else lines[0]) if lines else ""
    return Outcome(status, f"{type(error).__name__}: {line}"[:500])


def _complaint(lines: list[str]) -> str:
    """What a compiler says is wrong: NVRTC's first error, below ours and above its own count of them; Triton
    puts the source first and what is wrong with it last."""
    return next((line for line in lines if _ERROR.search(line)), lines[-1])


@contextlib.contextmanager
def wall_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `seconds`, once Python code runs again.

    Works in the main thread of a process that has signals; elsewhere the block runs without a limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
