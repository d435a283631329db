"""Keeps TensorFlow's banner off the screen of the `keras-mp` command.

TensorFlow's native code writes the banner to file descriptor 2 during its import. No option drops only the banner. So
the command sends this descriptor through a small process that drops the banner's lines. That process passes on all
other lines at once, also the last words of a native crash.
"""

import atexit
import contextlib
import os
import subprocess
import sys

__all__ = ["start"]

# Python's own messages do not pass the filter.
_BANNER = (
    "All log messages before absl::InitializeLog",
    "oneDNN custom operations are on",
    "oneDNN supports DT_HALF only",
    "This TensorFlow binary is optimized to use",
    "To enable the following instructions: ",
    "mlir_graph_optimization_pass.cc:",
    "computation_placer.cc:",
    r"cuda_(fft|dnn|blas)\.cc:\d+\] Unable to register",
    "Could not find cuda drivers on your machine",
    "Could not find TensorRT",
    "Cannot dlopen some GPU libraries",
    "Skipping registering GPU devices",
    "failed call to cuInit",
)

_FILTER = """
import re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
banner = re.compile(sys.argv[1].encode())
for line in sys.stdin.buffer:
    if not banner.search(line):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""


def start() -> None:
    """Sends what native code writes to file descriptor 2 through the filter, until the process ends.

    `TF_CPP_MIN_LOG_LEVEL=0` keeps the banner. It must be called before TensorFlow is imported.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        return
    command = [sys.executable, "-I", "-S", "-c", _FILTER, "|".join(_BANNER)]
    try:
        screen = os.dup(2)
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=screen)
    except OSError:  # there is no standard error stream, or no room for another process
        return
    assert process.stdin is not None
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    # Python's messages, prompts and progress bars go straight to the screen.
    sys.stderr = os.fdopen(screen, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")

    def finish() -> None:
        os.dup2(screen, 2)  # so the filter sees the end of its input
        with contextlib.suppress(subprocess.TimeoutExpired):  # if a process that the command started still writes
            process.wait(timeout=5)

    atexit.register(finish)
