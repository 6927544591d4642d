"""One thread that does what it is asked to, and in between what is most urgent."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import Condition, Thread, current_thread
from typing import TypeVar

from sfrt.errors import ConfigError

Job = Callable[[], None]
R = TypeVar("R")


class Worker:
    """A thread, and the lock of all that it shares with others.

    Attributes: lock (guards everything that is shared; held for moments only, never while a job runs).
    """

    def __init__(self, choose: Callable[[], Job | float | None], owning: AbstractContextManager[object]) -> None:
        """choose() is the next job where nothing was asked for; else how many seconds to wait for news (None: any).

        Neither choose nor a job may raise. The thread does its work within `owning`.
        """
        self.lock = Condition()
        self._choose = choose
        self._owning = owning
        self._tasks: deque[Job] = deque()
        self._version = 0
        self._closing = False
        self._thread = Thread(target=self._work, name="sfrt-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @contextmanager
    def changes(self) -> Iterator[None]:
        """Hold the lock to change what the thread goes by, and have it choose again."""
        with self.lock:
            yield
            self._version += 1
            self.lock.notify_all()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        """Have this done before the next job that is chosen; at once, where the thread itself asks.

        Raises ConfigError where the thread has stopped.
        """
        future: Future[R] = Future()
        task = partial(_run, work, future)
        if current_thread() is self._thread:
            task()
            return future
        with self.changes():
            if self._closing:
                raise ConfigError("the engine is closed; make another one")
            self._tasks.append(task)
        return future

    def do(self, work: Callable[[], R]) -> R:
        """`submit`, and wait for what comes of it."""
        return self.submit(work).result()

    def close(self, last: Job, timeout: float | None = None) -> None:
        """Do what was asked for, then `last`, and end. Raises TimeoutError where it takes more seconds than that."""
        with self.changes():
            if not self._closing:
                self._tasks.append(last)
            self._closing = True
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the chunk that is being made was not done within {timeout} s")

    def _work(self) -> None:
        with self._owning:
            while True:
                with self.lock:
                    version = self._version
                    job: Job | float | None = self._tasks.popleft() if self._tasks else None
                    if job is None and self._closing:
                        return
                if job is None:
                    job = self._choose()
                if callable(job):
                    job()
                else:
                    with self.lock:
                        if self._version == version:  # or there is news already
                            self.lock.wait(job)


def _run(work: Callable[[], R], future: Future[R]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
        del future, work  # the error's traceback holds this frame, which would hold the error
