"""Embedding of whole numbers, of which a step reads the rows that it needs and no others."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp.layers.core.quantizing import Quantizing

__all__ = ["Embedding", "rows_of"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Embedding(Quantizing, keras.layers.Embedding):
    """Turns whole numbers into rows of a table, and reads only these rows of it.

    A drop-in for `keras.layers.Embedding`, with the same arguments, weights and numbers. Keras reads the whole table
    and takes the rows of that; where an optimizer updates rows in place, as it does by sparse gradients, TensorFlow
    copies the table for each such reading. Rows are read in float32 and cast. In `keras_mp.Model`, unless XLA compiles
    the pass or replicas train, the table is read nowhere else in a step.

    Args:
        input_dim: int, number of rows of the table.
        output_dim: int, length of a row.
        **kwargs: the other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of whole numbers of any shape. A negative one counts from the end.

    Returns:
        Tensor of shape (*shape of inputs, output_dim), in the compute dtype.

    Raises:
        ValueError: as Keras's layer, for arguments out of range.
        tf.errors.InvalidArgumentError: on a CPU, without XLA, for a number that the table has no row of.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Embedding(10, 4, dtype="mixed_bfloat16")
        >>> y = layer(np.array([[1, 2, 3]]))
        >>> y.shape, y.dtype
        (TensorShape([1, 3, 4]), tf.bfloat16)
    """

    def call(self, inputs: Any) -> Any:
        """Looks rows up; see the class."""
        rows = rows_of(self, inputs)
        return super().call(inputs) if rows is None else rows


def rows_of(layer: Any, inputs: Any) -> Any:
    """The rows of an embedding's table, of which no more is read; None where only Keras knows how to look them up.

    Args:
        layer: a Keras embedding.
        inputs: tensor of whole numbers.
    """
    table = layer.embeddings
    # With LoRA it is a sum, and other tensors have lookups of their own in Keras.
    if not isinstance(table, keras.Variable) or not isinstance(inputs, tf.Tensor):
        return None
    if inputs.dtype not in (tf.int32, tf.int64):
        inputs = tf.cast(inputs, tf.int32)
    rows = tf.where(inputs < 0, inputs + table.shape[0], inputs)
    # A Keras variable would be read before the lookup, TensorFlow's is not.
    return tf.cast(tf.gather(table.value, rows), layer.compute_dtype)
