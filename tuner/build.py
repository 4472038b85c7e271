"""Build and verify candidates: here, or in worker processes on a machine where kernels have to be compiled.

Workers compile side by side (a Triton kernel takes seconds) and share the compiler's cache on disk with the
process that measures. They also take the blow: a candidate that crashes or hangs costs a worker, not the run.
Nothing is timed while workers are busy.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeVar

import torch

from chipmunk_kernels import registry
from chipmunk_kernels.problem import Problem
from tuner.errors import failure, wall_limit
from tuner.problem import Options
from tuner.store import Outcome
from tuner.verify import Check, verify

STARTUP_S = 120.0
"""A worker imports torch and opens the device before its first task; that is not the candidate's fault."""


class DeviceLost(RuntimeError):
    """The device's context is gone; this process cannot go on, another can."""


@dataclass(frozen=True)
class Task:
    """A candidate to build and verify, in plain values that travel to another process."""

    problem: Problem
    backend: str
    settings: dict[str, Any]
    device: str
    seed: int
    options: Options = ()


Answer = Check | Outcome
"""A check, passed or not; or the outcome that a failure to run stands for."""


class OnDevice(Protocol):
    """What a worker needs to know of any task."""

    @property
    def device(self) -> str: ...


T = TypeVar("T", bound=OnDevice)
R = TypeVar("R")


class Builder(Protocol):
    """Builds and verifies tasks. `isolated` says whether a crash there leaves this process alive."""

    width: int
    isolated: bool

    def run(self, tasks: Sequence[Task], limit_s: float) -> Iterator[tuple[int, Answer]]: ...

    def close(self) -> None: ...


def check(task: Task) -> Check:
    """Build and verify one task in this process. Raises whatever the kernel raises."""
    kernel = registry.kernel(task.problem.operation, task.backend)
    settings = kernel.settings.from_mapping(task.settings)
    started = time.monotonic()
    result = verify(kernel, settings, task.problem, torch.device(task.device), task.seed, task.options)
    return replace(result, seconds=time.monotonic() - started)


class InlineBuilder(Generic[T, R]):
    """One task after the other, in this process.

    Args:
        function: what to do with a task.
    """

    width = 1
    isolated = False

    def __init__(self, function: Callable[[T], R]) -> None:
        self._function = function

    def run(self, tasks: Sequence[T], limit_s: float) -> Iterator[tuple[int, R | Outcome]]:
        """(index, answer) of each task in turn."""
        for index, task in enumerate(tasks):
            yield index, _answer(self._function, task, limit_s)

    def close(self) -> None:
        """Nothing to end."""


class PoolBuilder(Generic[T, R]):
    """Worker processes, replaced when they die or take too long.

    Args:
        width: how many.
        function: what a worker does with a task; importable by name.
    """

    isolated = True

    def __init__(self, width: int, function: Callable[[T], R]) -> None:
        self.width = width
        self._function = function
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[T], limit_s: float) -> Iterator[tuple[int, R | Outcome]]:
        """(index, answer) in the order in which they come; every task gets one."""
        pending = list(enumerate(tasks))[::-1]
        while len(self._workers) < min(self.width, len(tasks)):
            self._workers.append(_Worker(self._function))
        while pending or any(worker.index is not None for worker in self._workers):
            for worker in self._workers:
                if worker.index is None and pending:
                    worker.give(*pending.pop(), limit_s)
            yield from self._collect()

    def _collect(self) -> Iterator[tuple[int, R | Outcome]]:
        """Answers that are there, after waiting for the first; dead and late workers give theirs, too."""
        busy = [worker for worker in self._workers if worker.index is not None]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        wait([worker.connection for worker in busy], timeout=min(patience, 1.0))
        for worker in busy:
            index, answer = worker.index, worker.take()
            if answer is not None and index is not None:
                yield index, answer
            if worker.lost:
                worker.end()
                self._workers[self._workers.index(worker)] = _Worker(self._function)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Worker:
    """A process with at most one task.

    Attributes:
        index: of the task in hand, None when idle.
        deadline: when that task is given up.
        lost: the process is of no more use.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self._process.start()
        theirs.close()
        self.index: int | None = None
        self.deadline = 0.0
        self.lost = False
        self._ready = False
        self._limit_s = 0.0

    def give(self, index: int, task: OnDevice, limit_s: float) -> None:
        self.index, self._limit_s = index, limit_s
        self.deadline = time.monotonic() + limit_s + (0.0 if self._ready else STARTUP_S)
        try:
            self.connection.send(task)
        except OSError:
            self.lost = True

    def take(self) -> Any:
        """The answer, None while it may still come; frees the worker."""
        answer = None
        try:
            while answer is None and self.connection.poll():
                message = self.connection.recv()
                if message is None:  # ready: the limit begins to count
                    self._ready = True
                    self.deadline = time.monotonic() + self._limit_s
                else:
                    answer, alive = message
                    self.lost = not alive
        except (EOFError, OSError):
            self.lost = True
            self._process.join(5)
            answer = Outcome("crashed", f"the process that built it died ({_exit(self._process.exitcode)})")
        if answer is None and time.monotonic() >= self.deadline:
            self.lost = True
            answer = Outcome("timeout", f"building and verifying took longer than {self._limit_s:.0f} s")
        if answer is not None:
            self.index = None
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.join(5)
        self.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: take a task, answer, until the other side is gone or the device is lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection.send(None)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        answer, alive = _answer(function, task, limit_s=None), device_alive(task.device)
        connection.send((answer, alive))
        if not alive:
            return


def _answer(function: Callable[[T], R], task: T, limit_s: float | None) -> R | Outcome:
    started = time.monotonic()
    try:
        if limit_s is None:
            return function(task)
        with wall_limit(limit_s):
            return function(task)
    except Exception as error:  # whatever a candidate throws is a datum
        return replace(failure(error), build_s=time.monotonic() - started)
    finally:
        if task.device.startswith("cuda") and device_alive(task.device):
            torch.cuda.empty_cache()


def device_alive(device: str) -> bool:
    """Whether the device still answers: an illegal access ends a CUDA context for good."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
