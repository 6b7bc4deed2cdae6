"""Worker processes that survive a crashing decoder, and die with their parent."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

__all__ = ["BrokenProcessPool", "InProcess", "Pool", "Workers", "cores"]

T = TypeVar("T")

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Workers(Protocol):
    """Whoever runs a task: other processes, or this one."""

    count: int
    """Tasks that run at the same time."""

    def submit(self, task: Callable[..., T], /, *arguments: Any) -> Future[T]:
        """Start a task."""
        ...


class InProcess:
    """Runs each task at once, in the caller: for a task that is a worker's already (Ray)."""

    count = 1

    def submit(self, task: Callable[..., T], /, *arguments: Any) -> Future[T]:
        """Run the task; its error, like its result, is met when the future is asked."""
        future: Future[T] = Future()
        try:
            future.set_result(task(*arguments))
        except Exception as error:  # handed on, not swallowed
            future.set_exception(error)
        return future


class Pool:
    """Processes that start fresh (no fork: readers hold locks and threads).

    When one of them is killed (a decoder's segmentation fault, the out-of-memory killer) all tasks in flight fail with
    :class:`BrokenProcessPool`, and the next task starts new processes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._mutex = threading.Lock()
        self._executor = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.count, mp_context=context, initializer=_begin)

    def submit(self, task: Callable[..., T], /, *arguments: Any) -> Future[T]:
        """Start a task in one of the processes."""
        with self._mutex:
            try:
                return self._executor.submit(task, *arguments)
            except BrokenProcessPool:
                self._executor.shutdown(wait=False)
                self._executor = self._start()
                return self._executor.submit(task, *arguments)

    def close(self) -> None:
        """End the processes; tasks that wait are dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Make a worker of this process.

    One thread: there is a process for each core already, and threads of a matrix product that wait for each other
    tripled the CPU time. And it ends when its parent is gone: after kill -9 the pool's own pipes would keep it waiting
    for ever.
    """
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    if "numpy" in sys.modules:  # by the caller's script, which a spawned process imports first: too late for those
        threadpool_limits(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
