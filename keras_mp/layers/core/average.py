"""The mean of several inputs, summed in float32."""

from typing import Any

import keras
import tensorflow as tf

__all__ = ["Average"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Average(keras.layers.Average):
    """Mean of several inputs, element by element, summed in float32 and rounded once.

    A drop-in for `keras.layers.Average`, with the same arguments. In float16 Keras's mean is inf where the sum exceeds
    65504.

    Args:
        **kwargs: `name`, `dtype` and other arguments of a Keras layer.

    Returns:
        Tensor in the compute dtype.

    Example:
        >>> import keras_mp
        >>> keras_mp.layers.Average(dtype="mixed_float16")([tf.constant([60000.0])] * 3).numpy().tolist()
        [60000.0]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autocast = False  # a float32 input must not be rounded before the float32 computation

    def call(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        """Takes the mean; see the class."""
        wide = str(keras.backend.result_type(self.compute_dtype, "float32"))
        return tf.cast(super().call([tf.cast(x, wide) for x in inputs]), self.compute_dtype)
