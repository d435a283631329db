"""TensorFlow's runtime: whether it runs, how its graphs are optimized, and what its native code logs."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

import tensorflow as tf

# Every public name that lists the runtime's devices starts it, and a started runtime takes no more configuration.
from tensorflow.python.eager import context as _context

__all__ = ["remapper_enabled", "runtime_started", "set_remapper", "without_log_lines"]


@contextlib.contextmanager
def without_log_lines(*marks: str) -> Iterator[None]:
    """Drops lines that TensorFlow's native code logs from the standard error stream and passes all else on, afterwards.

    `TF_CPP_MIN_LOG_LEVEL=0` keeps them. The stream is taken at the file descriptor, where native code writes.

    Args:
        marks: a line that contains one of these is dropped.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0":
        yield
        return
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # a service without a standard error stream
        yield
        return
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            captured.seek(0)
            rest = [
                line
                for line in captured.read().decode(errors="replace").splitlines(keepends=True)
                if not any(mark in line for mark in marks)
            ]
            if rest:
                os.write(2, "".join(rest).encode())


def remapper_enabled() -> bool:
    """Whether grappler may fuse a product with the bias and activation that follow it."""
    return bool(tf.config.optimizer.get_experimental_options().get("remapping", True))


def runtime_started() -> bool:
    """Whether TensorFlow's eager runtime runs, after which devices, threads and collectives cannot be configured."""
    return bool(_context.context()._initialized)


def set_remapper(enabled: bool) -> None:
    """Allows or forbids grappler's fusion of a product with the bias and activation that follow it.

    On CPUs with AMX, oneDNN's fused float16 product runs up to a thousand times slower than the float32 one; the same
    product followed by separate ops does not. The setting holds for the whole process.

    Args:
        enabled: whether the fusion may happen.
    """
    tf.config.optimizer.set_experimental_options({"remapping": enabled})
