"""Activations of one number at a time."""

from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf

from keras_mp.activations.symbolic import Symbolic
from keras_mp.ops import elementwise

__all__ = ["gelu", "hard_silu", "mish", "silu"]

# As Keras's activations take it; a `keras.KerasTensor` gives one.
ArrayLike: TypeAlias = "tf.Tensor | np.ndarray | keras.KerasTensor"


@keras.saving.register_keras_serializable(package="keras_mp")
def gelu(x: ArrayLike, approximate: bool = False) -> tf.Tensor:
    """Gaussian error linear unit, x * P(X <= x) for a standard normal X, computed in float32.

    A drop-in for `keras.activations.gelu`. Stock Keras rounds every operation to the dtype of `x`, which costs the
    digits of small values: in bfloat16 gelu(-3) is off by 2%. At -inf it returns the limit, 0, where stock Keras
    returns NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.
        approximate: whether to use the approximation by tanh. Defaults to False.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if the dtype of `x` is not floating-point.

    Example:
        >>> import keras
        >>> import keras_mp
        >>> layer = keras.layers.Dense(4, activation=keras_mp.activations.gelu, dtype="mixed_bfloat16")
        >>> keras_mp.activations.gelu(tf.constant([-60000.0, 0.0, 60000.0], "float16")).numpy().tolist()
        [-0.0, 0.0, 60000.0]

    Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016, https://arxiv.org/abs/1606.08415.
    """
    return _elementwise("gelu", x, approximate=bool(approximate))


@keras.saving.register_keras_serializable(package="keras_mp")
def silu(x: ArrayLike) -> tf.Tensor:
    """Sigmoid linear unit (swish), x * sigmoid(x), computed in float32.

    A drop-in for `keras.activations.silu`. At -inf it returns the limit, 0, where stock Keras returns NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if the dtype of `x` is not floating-point.

    Example:
        >>> import keras_mp
        >>> float(keras_mp.activations.silu(tf.constant(2.0, "bfloat16")))
        1.7578125

    Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units", 2017, https://arxiv.org/abs/1702.03118.
    """
    return _elementwise("silu", x)


@keras.saving.register_keras_serializable(package="keras_mp")
def mish(x: ArrayLike) -> tf.Tensor:
    """Mish, x * tanh(softplus(x)), computed in float32.

    A drop-in for `keras.activations.mish`. At -inf it returns the limit, 0, where stock Keras returns NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if the dtype of `x` is not floating-point.

    Example:
        >>> import keras_mp
        >>> float(keras_mp.activations.mish(tf.constant(1.0, "bfloat16")))
        0.86328125

    Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019, https://arxiv.org/abs/1908.08681.
    """
    return _elementwise("mish", x)


@keras.saving.register_keras_serializable(package="keras_mp")
def hard_silu(x: ArrayLike) -> tf.Tensor:
    """Hard sigmoid linear unit (hard swish), x * min(max(x + 3, 0), 6) / 6, computed in float32.

    A drop-in for `keras.activations.hard_silu`. At -inf it returns the limit, 0, where stock Keras returns NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if the dtype of `x` is not floating-point.

    Example:
        >>> import keras_mp
        >>> float(keras_mp.activations.hard_silu(tf.constant(1.0, "bfloat16")))
        0.66796875

    Howard et al., "Searching for MobileNetV3", 2019, https://arxiv.org/abs/1905.02244.
    """
    return _elementwise("hard_silu", x)


def _elementwise(function: str, x: ArrayLike, **settings: bool) -> tf.Tensor:
    is_symbolic = isinstance(x, keras.KerasTensor)
    x = x if is_symbolic else keras.ops.convert_to_tensor(x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            f"`{function}` takes a tensor of a floating-point dtype. Received: x.dtype={dtype}. "
            'Cast it first: keras.ops.cast(x, "float32").'
        )
    if is_symbolic:
        return Symbolic(function, settings)(x)
    return elementwise.gated(x, function, **settings)
