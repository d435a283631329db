"""Embedding of integers that reads the rows a training step needs and no others."""

import keras
import tensorflow as tf

from keras_mp.layers.core.quantizing import Quantizing

__all__ = ["Embedding", "rows_of"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Embedding(Quantizing, keras.layers.Embedding):
    """Looks up rows of a table by integers, and reads only these rows.

    A drop-in for `keras.layers.Embedding`, with the same arguments, weights and numbers. Keras reads the whole table
    first. Where an optimizer updates rows in place, by sparse gradients, TensorFlow copies the table for each such
    read. This layer reads the rows in float32 and casts them. In `keras_mp.Model` nothing else reads the table in a
    training step, unless XLA compiles the step or replicas train.

    Args:
        input_dim: int, number of rows of the table.
        output_dim: int, length of a row.
        **kwargs: other arguments of Keras's layer.

    Call arguments:
        inputs: tensor of integers, of any shape. A negative one counts from the end.

    Returns:
        Tensor of shape (*shape of inputs, output_dim) in the compute dtype.

    Raises:
        tf.errors.InvalidArgumentError: on a CPU, outside XLA, if the table has no such row.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.Embedding(10, 4, dtype="mixed_bfloat16")
        >>> y = layer(np.array([[1, 2, 3]]))
        >>> y.shape, y.dtype
        (TensorShape([1, 3, 4]), tf.bfloat16)
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Looks up rows; see the class."""
        rows = rows_of(self, inputs)
        return super().call(inputs) if rows is None else rows


def rows_of(layer: keras.layers.Embedding, inputs: tf.Tensor) -> tf.Tensor | None:
    """Returns rows of an embedding's table and reads no others; None where only Keras can look them up.

    Args:
        layer: a Keras embedding.
        inputs: tensor of integers.
    """
    table = layer.embeddings
    # With LoRA the table is a sum, and for sparse and ragged tensors Keras has other lookups.
    if not isinstance(table, keras.Variable) or not isinstance(inputs, tf.Tensor):
        return None
    if inputs.dtype not in (tf.int32, tf.int64):
        inputs = tf.cast(inputs, tf.int32)
    rows = tf.where(inputs < 0, inputs + table.shape[0], inputs)
    # A Keras variable would be read before the lookup. TensorFlow's is not.
    return tf.cast(tf.gather(table.value, rows), layer.compute_dtype)
