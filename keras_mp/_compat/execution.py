"""Where the current code runs: in XLA, under a gradient tape, on a CPU, in forward mode."""

import dataclasses
import sys
import types
from typing import Any

import tensorflow as tf

# The operation across which XLA does not optimize has no public name, and no gradient.
from tensorflow.compiler.tf2xla.python import xla as _xla

# No public name tells whether a forward accumulator is watching a tensor.
from tensorflow.python.eager import forwardprop_util as _forwardprop_util

# No public name tells whether a gradient tape is watching. It decides whether a function is compiled on its own.
from tensorflow.python.eager import record as _record

# No public name tells whether XLA will compile the function that is being traced. XLA cannot compile ops that call back
# into Python.
from tensorflow.python.ops import control_flow_util as _control_flow_util

# `tf.vectorized_map` replaces single ops and so loses custom gradients. No public name tells whether it is tracing.
from tensorflow.python.ops.parallel_for import control_flow_ops as _parallel_for

from keras_mp._compat import patches

__all__ = [
    "Execution",
    "current",
    "forward_mode",
    "in_xla_context",
    "on_cpu",
    "optimization_barrier",
    "recording",
]


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where a layer's call runs. A layer asks `current` once in its call and passes the value on.

    Attributes:
        training: whether a gradient tape records the call and uses custom gradients.
        on_cpu: whether there is neither a GPU nor a TPU.
        in_xla: whether XLA compiles the function that is being traced.
        in_vectorized_map: whether `tf.vectorized_map` is tracing.
        replicas: the number of replicas that run this together; 1 outside a replica.
    """

    training: bool
    on_cpu: bool
    in_xla: bool
    in_vectorized_map: bool
    replicas: int


def current() -> Execution:
    """Returns where the current code runs.

    Example:

    >>> current().training
    False
    """
    patches.install_on_first_use()
    replica = tf.distribute.get_replica_context()
    vectorized = _in_vectorized_map()
    return Execution(
        training=bool(_record.could_possibly_record()) and not vectorized,
        on_cpu=on_cpu(),
        in_xla=in_xla_context(),
        in_vectorized_map=vectorized,
        replicas=1 if replica is None else replica.num_replicas_in_sync,
    )


def in_xla_context() -> bool:
    """Returns whether the current code is being traced for XLA.

    Returns:
        True inside `tf.function(jit_compile=True)` and inside the step of a TPU strategy, False in eager code and in
        other graphs.
    """
    if tf.executing_eagerly():
        return False
    return bool(_control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def on_cpu() -> bool:
    """Returns whether there is neither a GPU nor a TPU."""
    return not tf.config.list_logical_devices("GPU") and not tf.config.list_logical_devices("TPU")


def optimization_barrier(x: tf.Tensor) -> tf.Tensor:
    """Returns the same tensor, but XLA knows only its dtype and shape.

    So XLA does not recompute it where it is used, and does not undo its rounding to half precision. Only XLA can run
    this op: ask `in_xla_context` first.

    Args:
        x: of any dtype and shape.
    """
    return x if forward_mode(x) else _optimization_barrier(x)  # the op has no forward derivative


@tf.custom_gradient
def _optimization_barrier(x: tf.Tensor) -> Any:
    return _xla.optimization_barrier(x)[0], lambda upstream: upstream


def recording() -> bool:
    """Returns whether a gradient tape watches, as in the forward pass of a training step.

    It is False inside `tf.vectorized_map`: a tape outside sees other ops, and no custom gradients.
    """
    return bool(_record.could_possibly_record()) and not _in_vectorized_map()


def forward_mode(*tensors: Any) -> bool:
    """Returns whether a `tf.autodiff.ForwardAccumulator` watches one of these tensors.

    Args:
        tensors: the inputs of an operation.
    """
    return bool(_forwardprop_util.pack_tangents([each for each in tensors if isinstance(each, tf.Tensor)]).tangents)


def _in_vectorized_map() -> bool:
    """Returns whether `tf.vectorized_map` is tracing the current code."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "loop_fn" and frame.f_globals is vars(_parallel_for):
            return True
        frame = frame.f_back
    return False
