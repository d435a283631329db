"""Activations of one number at a time, by formula or, of 16 bits on a CPU, out of a table."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp.activations.symbolic import Symbolic
from keras_mp.ops import fusion

__all__ = ["gelu", "hard_silu", "mish", "silu"]


@keras.saving.register_keras_serializable(package="keras_mp")
def gelu(x: Any, approximate: bool = False) -> Any:
    """Gaussian error linear unit, x * P(X <= x) for a standard normal X, computed in float32.

    A drop-in for `keras.activations.gelu`. Stock Keras rounds every step of it to the dtype of `x`, which costs the
    digits of small values: in bfloat16 gelu(-3) is off by 2%. At -inf the answer is the limit, 0, where stock Keras
    answers NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.
        approximate: whether to use the approximation by tanh. Defaults to False.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if `x` is not of a floating-point dtype.

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
def silu(x: Any) -> Any:
    """Sigmoid linear unit (swish), x * sigmoid(x), computed in float32.

    A drop-in for `keras.activations.silu`. At -inf the answer is the limit, 0, where stock Keras answers NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if `x` is not of a floating-point dtype.

    Example:
        >>> import keras_mp
        >>> float(keras_mp.activations.silu(tf.constant(2.0, "bfloat16")))
        1.7578125

    Elfwing, Uchibe and Doya, "Sigmoid-Weighted Linear Units", 2017, https://arxiv.org/abs/1702.03118.
    """
    return _elementwise("silu", x)


@keras.saving.register_keras_serializable(package="keras_mp")
def mish(x: Any) -> Any:
    """Mish, x * tanh(softplus(x)), computed in float32.

    A drop-in for `keras.activations.mish`. At -inf the answer is the limit, 0, where stock Keras answers NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if `x` is not of a floating-point dtype.

    Example:
        >>> import keras_mp
        >>> float(keras_mp.activations.mish(tf.constant(1.0, "bfloat16")))
        0.86328125

    Misra, "Mish: A Self Regularized Non-Monotonic Activation Function", 2019, https://arxiv.org/abs/1908.08681.
    """
    return _elementwise("mish", x)


@keras.saving.register_keras_serializable(package="keras_mp")
def hard_silu(x: Any) -> Any:
    """Hard sigmoid linear unit (hard swish), x * min(max(x + 3, 0), 6) / 6, computed in float32.

    A drop-in for `keras.activations.hard_silu`. At -inf the answer is the limit, 0, where stock Keras answers NaN.

    Args:
        x: tensor of any shape; float16, bfloat16, float32 or float64.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        ValueError: if `x` is not of a floating-point dtype.

    Example:
        >>> import keras_mp
        >>> float(keras_mp.activations.hard_silu(tf.constant(1.0, "bfloat16")))
        0.66796875

    Howard et al., "Searching for MobileNetV3", 2019, https://arxiv.org/abs/1905.02244.
    """
    return _elementwise("hard_silu", x)


# Beyond this all of them are x or 0 also in float64. Limits keep inf * 0 out of value and gradient.
_FAR = 1000.0


def _normal_cdf(x: Any) -> Any:
    return 0.5 * tf.math.erfc(x * -(0.5**0.5))


def _tanh_argument(x: Any) -> tuple[Any, Any]:
    """Twice the argument of tanh in the approximation of gelu, as (1 + tanh(u)) / 2 = sigmoid(2u), and its slope."""
    factor = 2 * (2 / 3.141592653589793) ** 0.5
    square = 0.044715 * x * x
    return factor * x * (1 + square), factor * (1 + 3 * square)


def _gelu(approximate: bool) -> tuple[Any, Any]:
    def factor(x: Any) -> Any:
        return tf.sigmoid(_tanh_argument(x)[0]) if approximate else _normal_cdf(x)

    def slope(x: Any) -> Any:
        if approximate:
            u, of_u = _tanh_argument(x)
            return tf.sigmoid(u) + x * tf.sigmoid(u) * tf.sigmoid(-u) * of_u
        return _normal_cdf(x) + x * tf.exp(-0.5 * x * x) * (2 * 3.141592653589793) ** -0.5

    return factor, slope


def _silu() -> tuple[Any, Any]:
    return tf.sigmoid, lambda x: tf.sigmoid(x) * (1 + x * tf.sigmoid(-x))


def _mish() -> tuple[Any, Any]:
    def factor(x: Any) -> Any:
        return tf.tanh(tf.math.softplus(x))

    def slope(x: Any) -> Any:
        y = factor(x)
        return y + x * tf.sigmoid(x) * (1 - y * y)

    return factor, slope


def _hard_silu() -> tuple[Any, Any]:
    def factor(x: Any) -> Any:
        return tf.clip_by_value(x + 3, 0, 6) / 6

    return factor, lambda x: tf.where(tf.abs(x) < 3, (2 * x + 3) / 6, factor(x))


# For each, functions from its settings to what x is multiplied with, and to the slope of the product.
_FUNCTIONS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "gelu": _gelu,
    "silu": _silu,
    "hard_silu": _hard_silu,
    "mish": _mish,
}


def _is_16_bit(x: Any) -> bool:
    return bool(x.dtype.is_floating and x.dtype.size == 2)


def _wide(x: Any) -> Any:
    return tf.cast(x, tf.float32) if _is_16_bit(x) else x


# Those that take longer to compute than to look up: a 16-bit number has 65,536 values.
_TABULATED = ("gelu", "silu", "mish")


def _value(x: Any, function: str, settings: Mapping[str, Any]) -> Any:
    factor, _ = _FUNCTIONS[function](**settings)
    x = tf.maximum(x, -_FAR)
    return x * factor(x)


def _slope(x: Any, function: str, settings: Mapping[str, Any]) -> Any:
    _, slope = _FUNCTIONS[function](**settings)
    return slope(tf.minimum(tf.maximum(x, -_FAR), _FAR))


@functools.cache
def _table(of: Callable[..., Any], function: str, settings: tuple[tuple[str, Any], ...], dtype: str) -> np.ndarray:
    """`_value` or `_slope` at each number of a 16-bit dtype, computed in float64, in the order of their bits."""
    # By NumPy, as TensorFlow's cast takes subnormal numbers for zero.
    with np.errstate(invalid="ignore"):  # NaN is among them
        numbers = np.arange(1 << 16, dtype=np.uint16).view(tf.as_dtype(dtype).as_numpy_dtype).astype(np.float64)
    with tf.init_scope(), tf.device("CPU"):
        return np.asarray(of(tf.constant(numbers), function, dict(settings)))


def _looked_up(x: Any, of: Callable[..., Any], function: str, settings: Mapping[str, Any], dtype: Any) -> Any:
    """The same for 16-bit numbers out of the table, in a dtype, with the derivative that the formula has."""

    @fusion.custom_gradient
    def at(x: Any) -> Any:
        table = tf.constant(_table(of, function, tuple(sorted(settings.items())), x.dtype.name), dtype)

        def gradient(upstream: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                computed = of(_wide(x), function, settings)
            return tape.gradient(computed, x, tf.cast(upstream, tf.float32))

        return tf.gather(table, tf.cast(tf.bitcast(x, tf.uint16), tf.int32)), gradient

    return at(x)


def _is_looked_up(x: Any, function: str) -> bool:
    return function in _TABULATED and _is_16_bit(x) and fusion.compiles_for_cpu()


def _elementwise_forward(x: Any, *, function: str, **settings: Any) -> Any:
    if _is_looked_up(x, function):
        return _looked_up(x, _value, function, settings, x.dtype)
    return fusion.rounded(_value(_wide(x), function, settings), x.dtype)


def _elementwise_backward(x: Any, upstream: Any, *, function: str, **settings: Any) -> Any:
    if _is_looked_up(x, function):
        slopes = _looked_up(x, _slope, function, settings, tf.float32)
    else:
        slopes = _slope(_wide(x), function, settings)
    return fusion.rounded(slopes * _wide(upstream), x.dtype)


_elementwise_operation = fusion.operation(_elementwise_forward, _elementwise_backward)


def _elementwise(function: str, x: Any, **settings: Any) -> Any:
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
    return _elementwise_operation(x, function=function, **settings)
