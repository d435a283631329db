"""Where the code that runs now is executed: by XLA, under a gradient tape, on a CPU, in forward mode."""

import dataclasses
import sys
import types
from typing import Any

import tensorflow as tf

# The operation that XLA does not optimize across has no public name, and no gradient.
from tensorflow.compiler.tf2xla.python import xla as _xla

# No public name tells whether a forward accumulator is watching a tensor.
from tensorflow.python.eager import forwardprop_util as _forwardprop_util

# No public name tells whether a gradient tape is watching. It decides whether a function is compiled on its own.
from tensorflow.python.eager import record as _record

# No public name tells whether the function that is being traced will be compiled by XLA. It decides whether an op that
# calls back into Python, which XLA cannot compile, may be placed in the graph.
from tensorflow.python.ops import control_flow_util as _control_flow_util

# `tf.vectorized_map` replaces ops one by one and so loses gradients of one's own, and has no public name to ask whether
# it is at work.
from tensorflow.python.ops.parallel_for import control_flow_ops as _parallel_for

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
    """Where a layer's call is executed. A layer asks `current` once in its call and passes the value on.

    Attributes:
        training: whether a gradient tape records what is computed, and takes the gradients that we define.
        on_cpu: whether there is neither a GPU nor a TPU.
        in_xla: whether XLA compiles the function that is being traced.
        in_vectorized_map: whether `tf.vectorized_map` is tracing.
        replicas: how many replicas run this in step; 1 outside a replica.
    """

    training: bool
    on_cpu: bool
    in_xla: bool
    in_vectorized_map: bool
    replicas: int


def current() -> Execution:
    """Returns where the code that runs now is executed.

    Example:

    >>> current().training
    False
    """
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
    """Whether the code that is running now is being traced for XLA.

    Returns:
        True inside `tf.function(jit_compile=True)` and inside the step of a TPU strategy, False in eager code and in
        other graphs.
    """
    if tf.executing_eagerly():
        return False
    return bool(_control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def on_cpu() -> bool:
    """Whether operations run on a CPU, for there is no GPU and no TPU."""
    return not tf.config.list_logical_devices("GPU") and not tf.config.list_logical_devices("TPU")


def optimization_barrier(x: tf.Tensor) -> tf.Tensor:
    """The same tensor, which XLA takes for another, that it knows nothing about but the dtype and the shape.

    It neither computes it anew in the place where it is used, nor keeps in float32 what was rounded to 16 bits. Only
    XLA can run it: ask `in_xla_context` first.

    Args:
        x: of any dtype and shape.
    """
    return x if forward_mode(x) else _optimization_barrier(x)  # of which there is no forward derivative


@tf.custom_gradient
def _optimization_barrier(x: tf.Tensor) -> Any:
    return _xla.optimization_barrier(x)[0], lambda upstream: upstream


def recording() -> bool:
    """Whether a gradient tape is watching what is computed now, so that this is the forward pass of a training step.

    Not so inside of `tf.vectorized_map`: a tape outside of it sees other ops, and none of our gradients.
    """
    return bool(_record.could_possibly_record()) and not _in_vectorized_map()


def forward_mode(*tensors: Any) -> bool:
    """Whether a `tf.autodiff.ForwardAccumulator` follows one of these tensors now.

    Args:
        tensors: what an operation is about to get.
    """
    return bool(_forwardprop_util.pack_tangents([each for each in tensors if isinstance(each, tf.Tensor)]).tangents)


def _in_vectorized_map() -> bool:
    """Whether what is computed now is traced by `tf.vectorized_map`."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "loop_fn" and frame.f_globals is vars(_parallel_for):
            return True
        frame = frame.f_back
    return False
