"""What a layer does about no rows, of which TensorFlow's operations on a CPU make errors.

A replica may be given none, as its share of an epoch's last batch. Of those TensorFlow's convolutions answer with the
shape of their input, which fits no bias and no other layer, and some of their gradients with what was in memory; the
gradient of its largest values in windows ends the process.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion

__all__ = ["in_replicas", "of_some"]


def in_replicas() -> bool:
    """Whether this runs in one replica of several."""
    replica = tf.distribute.get_replica_context()
    return replica is not None and replica.num_replicas_in_sync > 1


def of_some(function: Callable[[Any], tf.Tensor], inputs: Any, served: bool = False) -> tf.Tensor:
    """A function of rows that is given one of zeros where there is none, whose answer to it is left out.

    Where rows cannot be missing it is the function alone.

    Args:
        function: from rows to as many rows.
        inputs: tensor of shape (batch, ...).
        served: whether anyone may call, and not `fit` alone, which has rows wherever there is one replica.

    Example:
        >>> of_some(lambda rows: rows[:, :2], tf.zeros([0, 3])).shape
        TensorShape([0, 2])
    """
    if not _may_be_missing(inputs, served):
        return function(inputs)
    rows = tf.shape(inputs)[0]
    some = tf.cond(rows > 0, lambda: inputs, lambda: tf.pad(inputs, [[0, 1], *[[0, 0]] * (inputs.shape.rank - 1)]))
    outputs = function(fusion.shaped(some, [None, *inputs.shape[1:]]))
    return tf.cond(rows > 0, lambda: outputs, lambda: outputs[:0])


def _may_be_missing(inputs: Any, served: bool) -> bool:
    """Whether a tensor has or may have no rows, where that would be wrong: on a CPU, outside XLA."""
    if (
        not isinstance(inputs, tf.Tensor)
        or not inputs.shape.rank
        or not execution.on_cpu()
        or execution.in_xla_context()
    ):
        return False
    return inputs.shape[0] == 0 or (inputs.shape[0] is None and (served or in_replicas()))
