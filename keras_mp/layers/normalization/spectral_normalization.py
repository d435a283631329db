"""Division of another layer's kernel by its largest singular value, found in float32."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_variables

__all__ = ["SpectralNormalization"]


@keras.saving.register_keras_serializable(package="keras_mp")
class SpectralNormalization(keras.layers.SpectralNormalization):
    """Spectral normalization of another layer's kernel that iterates on, and writes back, the float32 kernel.

    A drop-in for `keras.layers.SpectralNormalization`, with the same arguments and weights. Keras's layer reads the
    kernel in the compute dtype and writes that back to the float32 weight, so each training step rounds the kernel to
    16 bits and with it loses every update smaller than that. It also casts the answer to the dtype of the input, which
    turns the vectors of an `Embedding` into integers; here the answer has the layer's compute dtype.

    Args:
        layer: a Keras layer with a `kernel` (`Dense`, `Conv2D`...) or `embeddings`.
        power_iterations: int, iterations a training step. Defaults to 1.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: what the wrapped layer takes.
        training: bool, whether to normalize the kernel before it is used. Defaults to False.

    Returns:
        What the wrapped layer answers, in this layer's compute dtype.

    Raises:
        ValueError: if `power_iterations` is not positive, or the wrapped layer has neither `kernel` nor `embeddings`.

    Example:
        >>> import keras
        >>> import keras_mp
        >>> import numpy as np
        >>> dense = keras.layers.Dense(3, dtype="mixed_float16")
        >>> layer = keras_mp.layers.SpectralNormalization(dense, power_iterations=50, dtype="mixed_float16")
        >>> y = layer(np.ones((2, 4), "float32"), training=True)
        >>> print(f"{np.linalg.norm(dense.kernel, 2):.4f}", y.dtype)
        1.0000 <dtype: 'float16'>

    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial Networks", 2018,
    https://arxiv.org/abs/1802.05957, algorithm 1.
    """

    def __init__(self, layer: Any, power_iterations: int = 1, **kwargs: Any) -> None:
        super().__init__(layer, power_iterations, **kwargs)
        self.autocast = False  # the wrapped layer casts its input itself, if at all

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """Normalizes the kernel, in training, and calls the wrapped layer with it."""
        if training:
            vector_u, kernel = self.normalized_weights()
            with keras_variables.without_autocast():
                self.vector_u.assign(vector_u)
                self.kernel.assign(kernel)
        return keras.ops.cast(self.layer(inputs), self.compute_dtype)

    def normalized_weights(self) -> tuple[Any, Any]:
        """The singular vector and the kernel after the iterations of a step; as they were, for a kernel of zeros."""
        dtype = keras.backend.result_type(self.kernel.dtype, "float32")
        kernel, before = (tf.cast(keras_variables.uncast(weight), dtype) for weight in (self.kernel, self.vector_u))
        weights = tf.reshape(kernel, [-1, self.kernel_shape[-1]])
        vector_u = before
        for _ in range(self.power_iterations):
            vector_v = _unit(tf.matmul(vector_u, weights, transpose_b=True))
            vector_u = _unit(tf.matmul(vector_v, weights))
        sigma = tf.squeeze(tf.matmul(tf.matmul(vector_v, weights), vector_u, transpose_b=True))
        some = sigma > 0
        return tf.where(some, vector_u, before), kernel / tf.where(some, sigma, tf.ones([], dtype))


def _unit(vector: Any) -> Any:
    return tf.math.divide_no_nan(vector, tf.norm(vector))
