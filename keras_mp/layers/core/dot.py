"""Products of samples of two inputs, made long 1 in float32."""

import string
from typing import Any

import keras
import tensorflow as tf

from keras_mp.layers.normalization.unit_normalization import unit
from keras_mp.ops import matmul

__all__ = ["Dot"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Dot(keras.layers.Dot):
    """Product of two inputs sample by sample, that normalizes in float32.

    A drop-in for `keras.layers.Dot`, with the same arguments. With `normalize`, Keras's squares in the compute dtype:
    in float16 a vector of zeros, or one of values of 100, gives NaN or 0. A product of two vectors a sample, as of a
    cosine similarity, is summed in float32 and rounded once.

    Args:
        axes: int, or two, to sum over.
        normalize: bool, whether to divide by the lengths along these axes first. Defaults to False.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: list of two tensors of shapes (batch, ...).

    Returns:
        Tensor in the compute dtype, of the axes of both without those summed over and the second batch.

    Raises:
        ValueError: if there are not two inputs, or the axes summed over differ in size.

    Example:
        >>> import keras_mp
        >>> x = tf.constant([[300.0, 400.0], [0.0, 0.0]])
        >>> keras_mp.layers.Dot(1, normalize=True, dtype="mixed_float16")([x, x]).numpy().tolist()
        [[1.0], [0.0]]
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def call(self, inputs: Any) -> Any:
        """Multiplies; see the class."""
        axes = [self.axes] * 2 if isinstance(self.axes, int) else self.axes
        axes = [axis % x.shape.rank for axis, x in zip(axes, inputs, strict=True)]
        vectors = all(x.shape.rank == 2 for x in inputs)
        wide = str(keras.backend.result_type(self.compute_dtype, "float32"))
        dtype = wide if vectors else self.compute_dtype
        if self.normalize:
            factors = [unit(x, (axis,), wide, dtype) for x, axis in zip(inputs, axes, strict=True)]
        else:
            factors = [tf.cast(x, dtype) for x in inputs]
        if vectors:
            return tf.cast(tf.reduce_sum(factors[0] * factors[1], 1, keepdims=True), self.compute_dtype)
        return matmul.product(lambda *pair: tf.einsum(_equation(pair, axes), *pair), *factors)


def _equation(factors: Any, axes: Any) -> str:
    """Of two factors whose first axes are the batch, summed over one axis of each.

    Example:
        >>> _equation((tf.zeros((2, 3, 4)), tf.zeros((2, 4, 5))), (2, 1))
        'abc,acd->abd'
    """
    letters = iter(string.ascii_lowercase)
    batch, *first = (next(letters) for _ in range(factors[0].shape.rank))
    summed = first.pop(axes[0] - 1)
    rest = [next(letters) for _ in range(factors[1].shape.rank - 2)]
    second = [*rest[: axes[1] - 1], summed, *rest[axes[1] - 1 :]]
    left = [*first[: axes[0] - 1], summed, *first[axes[0] - 1 :]]
    return f"{batch}{''.join(left)},{batch}{''.join(second)}->{batch}{''.join(first + rest)}"
