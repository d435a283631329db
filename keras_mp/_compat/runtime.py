"""TensorFlow's runtime: whether it runs, and how its graphs are optimized."""

import tensorflow as tf

# Every public name that lists the runtime's devices starts it, and a started runtime takes no more configuration.
from tensorflow.python.eager import context as _context

__all__ = ["remapper_enabled", "runtime_started", "set_remapper"]


def remapper_enabled() -> bool:
    """Returns whether grappler may fuse a matmul with the bias and activation that follow it."""
    return bool(tf.config.optimizer.get_experimental_options().get("remapping", True))


def runtime_started() -> bool:
    """Returns whether TensorFlow's eager runtime runs. After that, devices, threads and collectives are fixed."""
    return bool(_context.context()._initialized)


def set_remapper(enabled: bool) -> None:
    """Allows or forbids grappler's fusion of a matmul with the bias and activation that follow it.

    On CPUs with AMX, oneDNN's fused float16 matmul runs up to a thousand times slower than the float32 one. Without the
    fusion it does not. The setting holds for the whole process.

    Args:
        enabled: whether the fusion may happen.
    """
    tf.config.optimizer.set_experimental_options({"remapping": enabled})
