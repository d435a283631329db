"""Starts the workers of a multi-worker job as processes of this machine, and ends them together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from keras_mp.errors import ArgumentError

__all__ = ["launch"]

_LOOK_EVERY_SECONDS = 0.05


def launch(command: Sequence[str], workers: int, *, output: IO[bytes] | None = None, grace_seconds: float = 5.0) -> int:
    """Runs a command in several processes that are the workers of one job, and waits for them.

    Each gets `TF_CONFIG` with addresses on 127.0.0.1 and its index. Their output is passed on line by line, after the
    worker's number. When one of them fails the others are ended as well: they could only wait for it.

    Args:
        command: the program and its arguments.
        workers: how many processes to start.
        output: a binary file for their output, both streams. By default standard output.
        grace_seconds: the time that a worker has to end by itself before it is killed.

    Returns:
        0 if all of them succeeded, else the exit code of the first that failed: 128 + N if signal N ended it.

    Raises:
        ArgumentError: for less than one worker, or no command.

    Example:
        >>> import io, sys
        >>> printed = io.BytesIO()
        >>> launch([sys.executable, "-c", "print('hello')"], workers=2, output=printed)
        0
        >>> sorted(printed.getvalue().decode().splitlines())
        ['[worker 0] hello', '[worker 1] hello']
    """
    if workers < 1:
        raise ArgumentError(f"launch(workers={workers}): expected at least 1.")
    if not command:
        raise ArgumentError("launch(command=[]): expected a program to run, such as [sys.executable, 'train.py'].")
    sink = _Sink(output or sys.stdout.buffer)
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(workers)]
    processes: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    with _signals_as_exceptions():
        try:
            for index in range(workers):
                config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
                process = subprocess.Popen(
                    command,
                    env={**os.environ, "TF_CONFIG": json.dumps(config), "PYTHONUNBUFFERED": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that a worker's child processes can be ended with it
                )
                processes.append(process)
                readers.append(threading.Thread(target=sink.pass_on, args=(index, process.stdout), daemon=True))
                readers[-1].start()
            return _wait(processes, sink)
        finally:
            _end(processes, grace_seconds)
            for reader in readers:
                reader.join(grace_seconds)


class _Sink:
    """Receives the lines of all workers, and writes each as a whole."""

    def __init__(self, output: IO[bytes]) -> None:
        self._output = output
        self._lock = threading.Lock()

    def pass_on(self, index: int, lines: IO[bytes]) -> None:
        with lines:
            for line in lines:
                self.write(f"[worker {index}] ".encode() + line.rstrip(b"\r\n"))

    def write(self, line: bytes) -> None:
        with self._lock:
            self._output.write(line + b"\n")
            self._output.flush()


def _wait(processes: "list[subprocess.Popen[bytes]]", sink: _Sink) -> int:
    running = dict(enumerate(processes))
    while running:
        for index, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[index]
            if code != 0:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                others = f"; the other {len(running)} still running are ended too" if running else ""
                sink.write(f"[launch] worker {index} {how}{others}".encode())
                return 128 - code if code < 0 else code
        time.sleep(_LOOK_EVERY_SECONDS)
    return 0


def _end(processes: "list[subprocess.Popen[bytes]]", grace_seconds: float) -> None:
    """Ends all running workers with their child processes. SIGKILL ends those that wait in native code."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    end = time.monotonic() + grace_seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
    for process in processes:
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # all of the group have ended
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Lets SIGTERM unwind the stack as Ctrl-C does, so that no worker stays behind."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
