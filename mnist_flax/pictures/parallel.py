"""Reads many pictures in parallel: decodes and segments them in a pool of processes, and keeps their order."""

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from mnist_flax.pictures.decode import PictureError
from mnist_flax.pictures.files import STDIN, read_file
from mnist_flax.pictures.segment import Digit
from mnist_flax.run.machine import num_cores

Outcome = list[Digit] | PictureError
Read = Callable[[bytes], list[Digit]]  # such as `segment.read_digits`

_FEW = 8  # pictures; reading fewer is faster than starting processes
_AHEAD = 8  # pictures per process that are read ahead of the caller; limits memory use


@contextlib.contextmanager
def read_ahead(names: Sequence[str], read: Read, num_workers: int = 0) -> Iterator[Iterator[tuple[str, Outcome]]]:
    """Reads the digits of many pictures; the iterator yields each file's name, in order, with its digits or its error.

    `num_workers` is the number of processes: 0 means one per core, or none for a few pictures. They start reading at
    once; at the end of the `with` block, pictures already being read are finished first.
    """
    if not num_workers and len(names) < _FEW:
        yield ((name, read_one(name, read)) for name in names)
        return
    with contextlib.closing(_Reader(names, read, num_workers or num_cores())) as reader:
        yield reader.outcomes()


def read_one(name: str, read: Read) -> Outcome:
    """Reads the digits of one picture; an error is returned, not raised."""
    try:
        return read(read_file(name))
    except PictureError as error:
        return error
    except MemoryError:
        return PictureError("needs more memory than there is; make it smaller")
    except Exception as error:  # one picture must not stop the others
        return PictureError(f"made this program fail ({type(error).__name__}: {error}); please report it")


class _Reader:
    """A pool of processes, and the pictures in progress."""

    def __init__(self, names: Sequence[str], read: Read, num_workers: int) -> None:
        self._read = read
        self._num_workers = num_workers
        self._names = iter(names)
        self._pool = _start(num_workers)
        self._pending: collections.deque[tuple[str, Future[Outcome]]] = collections.deque()
        self._submit(itertools.islice(self._names, _AHEAD * num_workers))

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        """Yields the outcomes in the order of the names."""
        while self._pending:
            name, future = self._pending.popleft()
            try:
                outcome = read_one(name, self._read) if name == STDIN else future.result()
            except BrokenProcessPool:
                outcome = self._after_a_crash(name)
            yield name, outcome
            self._submit(itertools.islice(self._names, 1))

    def close(self) -> None:
        """Ends the processes; pictures that are not yet being read are skipped."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, names: Iterator[str]) -> None:
        for name in names:
            try:
                future = Future[Outcome]() if name == STDIN else self._pool.submit(read_one, name, self._read)
            except BrokenProcessPool as error:
                future = Future()
                future.set_exception(error)
            self._pending.append((name, future))

    def _after_a_crash(self, name: str) -> Outcome:
        """Reads a picture alone, because it may be the one that killed a process, and starts a new pool."""
        self._pool.shutdown(cancel_futures=True)
        with _start(1) as alone:
            try:
                outcome = alone.submit(read_one, name, self._read).result()
            except BrokenProcessPool:
                outcome = PictureError("kills the process that reads it; it may need more memory than there is")
        self._pool = _start(self._num_workers)
        pending, self._pending = self._pending, collections.deque()
        self._submit(name for name, _ in pending)
        return outcome


def _start(num_workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked, because this process may have threads.
    return ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), initializer=_initialize)


def _initialize() -> None:
    """Makes a pool process ignore Ctrl-C, which the parent handles, and exit when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
