"""Dot products of two inputs, sample by sample."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.normalization.unit_normalization import unit
from keras_mp.ops import dense

__all__ = ["Dot"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Dot(keras.layers.Dot):
    """Dot product of two inputs, sample by sample, normalized in float32.

    A drop-in for `keras.layers.Dot`, with the same arguments. With `normalize`, Keras's layer squares in the compute
    dtype. In float16 a vector of zeros gives NaN, and one of values of 100 gives 0. Here the dot product of two
    vectors, as for a cosine similarity, is also summed in float32 and rounded once.

    Args:
        axes: int, or two, to sum over.
        normalize: bool, whether to divide by the lengths along these axes first. Defaults to False.
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Returns:
        Tensor in the compute dtype. It has the axes of both inputs, without the second batch axis and `axes`.

    Example:
        >>> import keras_mp
        >>> x = tf.constant([[300.0, 400.0], [0.0, 0.0]])
        >>> keras_mp.layers.Dot(1, normalize=True, dtype="mixed_float16")([x, x]).numpy().tolist()
        [[1.0], [0.0]]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # a float32 input must not be rounded before the float32 computation

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        """Multiplies; see the class."""
        axes = [self.axes] * 2 if isinstance(self.axes, int) else self.axes
        axes = [axis % x.shape.rank for axis, x in zip(axes, inputs, strict=True)]
        vectors = all(x.shape.rank == 2 for x in inputs)
        wide = str(keras.backend.result_type(self.compute_dtype, "float32"))
        dtype = wide if vectors else self.compute_dtype
        if self.normalize:
            a, b = (unit(x, (axis,), wide, dtype) for x, axis in zip(inputs, axes, strict=True))
        else:
            a, b = (tf.cast(x, dtype) for x in inputs)
        if vectors:
            return tf.cast(tf.reduce_sum(a * b, 1, keepdims=True), self.compute_dtype)
        return dense.batch_dot(a, b, axes, execution.current())
