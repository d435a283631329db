"""The one door for operations that fail without rows on a CPU.

A replica may get no rows, as its share of an epoch's last batch. TensorFlow's convolutions then return the shape of
their input, which fits no bias and no next layer. Some of their gradients return uninitialized memory. The gradient of
max pooling ends the process.
"""

from collections.abc import Callable

import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["of_some"]


def of_some(
    function: Callable[[tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    served: bool = False,
    where: execution.Execution | None = None,
) -> tf.Tensor:
    """Returns a function of rows. Where there are none, it gives the function one of zeros and drops its output.

    Where there must be rows, it calls the function and adds nothing to the graph.

    Args:
        function: takes rows and returns as many.
        inputs: tensor of shape (batch, ...).
        served: whether anyone may call this. `fit` has rows wherever there is one replica.
        where: where the layer's call is executed; by default `execution.current()`.

    Example:
        >>> of_some(lambda rows: rows[:, :2], tf.zeros([0, 3])).shape
        TensorShape([0, 2])
    """
    if not _may_be_missing(inputs, served, where or execution.current()):
        return function(inputs)
    rows = tf.shape(inputs)[0]
    some = tf.cond(rows > 0, lambda: inputs, lambda: tf.pad(inputs, [[0, 1], *[[0, 0]] * (inputs.shape.rank - 1)]))
    outputs = function(fusion.shaped(some, [None, *inputs.shape[1:]]))
    return tf.cond(rows > 0, lambda: outputs, lambda: outputs[:0])


def _may_be_missing(inputs: tf.Tensor, served: bool, where: execution.Execution) -> bool:
    """Whether a tensor may have no rows where that would be wrong: on a CPU, outside XLA."""
    if not isinstance(inputs, tf.Tensor) or not inputs.shape.rank or not where.on_cpu or where.in_xla:
        return False
    return inputs.shape[0] == 0 or (inputs.shape[0] is None and (served or where.replicas > 1))
