"""Gated activations x * factor(x), one number at a time: by formula or, for 16-bit numbers on a CPU, from a table."""

import functools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["gated"]

# Beyond this each function is x or 0, also in float64. The limit keeps inf * 0 out of value and gradient.
_FAR = 1000.0

Elementwise: TypeAlias = Callable[[tf.Tensor], tf.Tensor]


def _normal_cdf(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * tf.math.erfc(x * -(0.5**0.5))


def _tanh_argument(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns twice the argument of tanh in the approximation of gelu, and its slope.

    (1 + tanh(u)) / 2 = sigmoid(2u).
    """
    factor = 2 * (2 / 3.141592653589793) ** 0.5
    square = 0.044715 * x * x
    return factor * x * (1 + square), factor * (1 + 3 * square)


def _gelu(approximate: bool) -> tuple[Elementwise, Elementwise]:
    def factor(x: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(_tanh_argument(x)[0]) if approximate else _normal_cdf(x)

    def slope(x: tf.Tensor) -> tf.Tensor:
        if approximate:
            u, of_u = _tanh_argument(x)
            return tf.sigmoid(u) + x * tf.sigmoid(u) * tf.sigmoid(-u) * of_u
        return _normal_cdf(x) + x * tf.exp(-0.5 * x * x) * (2 * 3.141592653589793) ** -0.5

    return factor, slope


def _silu() -> tuple[Elementwise, Elementwise]:
    return tf.sigmoid, lambda x: tf.sigmoid(x) * (1 + x * tf.sigmoid(-x))


def _mish() -> tuple[Elementwise, Elementwise]:
    def factor(x: tf.Tensor) -> tf.Tensor:
        return tf.tanh(tf.math.softplus(x))

    def slope(x: tf.Tensor) -> tf.Tensor:
        y = factor(x)
        return y + x * tf.sigmoid(x) * (1 - y * y)

    return factor, slope


def _hard_silu() -> tuple[Elementwise, Elementwise]:
    def factor(x: tf.Tensor) -> tf.Tensor:
        return tf.clip_by_value(x + 3, 0, 6) / 6

    return factor, lambda x: tf.where(tf.abs(x) < 3, (2 * x + 3) / 6, factor(x))


# By name: from a function's settings to the factor of x, and to the slope of x * factor(x).
_FUNCTIONS: dict[str, Callable[..., tuple[Elementwise, Elementwise]]] = {
    "gelu": _gelu,
    "silu": _silu,
    "hard_silu": _hard_silu,
    "mish": _mish,
}


def _is_16_bit(x: tf.Tensor) -> bool:
    return bool(x.dtype.is_floating and x.dtype.size == 2)


def _wide(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32) if _is_16_bit(x) else x


# Functions that take longer to compute than to look up: a 16-bit number has 65,536 values.
_TABULATED = ("gelu", "silu", "mish")


def _value(x: tf.Tensor, function: str, settings: Mapping[str, bool]) -> tf.Tensor:
    factor, _ = _FUNCTIONS[function](**settings)
    x = tf.maximum(x, -_FAR)
    return x * factor(x)


def _slope(x: tf.Tensor, function: str, settings: Mapping[str, bool]) -> tf.Tensor:
    _, slope = _FUNCTIONS[function](**settings)
    return slope(tf.minimum(tf.maximum(x, -_FAR), _FAR))


@functools.cache
def _table(
    of: Callable[..., tf.Tensor], function: str, settings: tuple[tuple[str, bool], ...], dtype: str
) -> np.ndarray:
    """Returns `_value` or `_slope` at each number of a 16-bit dtype, in the order of their bits, from float64."""
    # NumPy casts, because TensorFlow's cast takes subnormal numbers for zero.
    with np.errstate(invalid="ignore"):  # NaN is among them
        numbers = np.arange(1 << 16, dtype=np.uint16).view(tf.as_dtype(dtype).as_numpy_dtype).astype(np.float64)
    with tf.init_scope(), tf.device("CPU"):
        return np.asarray(of(tf.constant(numbers), function, dict(settings)))


def _looked_up(
    x: tf.Tensor, of: Callable[..., tf.Tensor], function: str, settings: Mapping[str, bool], dtype: tf.DType
) -> tf.Tensor:
    """Returns `of` for 16-bit numbers from the table, in a dtype, with the derivative of the formula."""

    @fusion.custom_gradient
    def at(x: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        table = tf.constant(_table(of, function, tuple(sorted(settings.items())), x.dtype.name), dtype)

        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(x)
                computed = of(_wide(x), function, settings)
            return tape.gradient(computed, x, tf.cast(upstream, tf.float32))

        return tf.gather(table, tf.cast(tf.bitcast(x, tf.uint16), tf.int32)), gradient

    return at(x)


def _is_looked_up(x: tf.Tensor, function: str) -> bool:
    return function in _TABULATED and _is_16_bit(x) and fusion.compiles_for_cpu()


def _forward(x: tf.Tensor, *, function: str, **settings: bool) -> tf.Tensor:
    if _is_looked_up(x, function):
        return _looked_up(x, _value, function, settings, x.dtype)
    return fusion.rounded(_value(_wide(x), function, settings), x.dtype)


def _backward(x: tf.Tensor, upstream: tf.Tensor, *, function: str, **settings: bool) -> tf.Tensor:
    if _is_looked_up(x, function):
        slopes = _looked_up(x, _slope, function, settings, tf.float32)
    else:
        slopes = _slope(_wide(x), function, settings)
    return fusion.rounded(slopes * _wide(upstream), x.dtype)


_operation = fusion.operation(_forward, _backward)


def gated(x: tf.Tensor, function: str, **settings: bool) -> tf.Tensor:
    """Returns "gelu", "silu", "hard_silu" or "mish" of a tensor, computed in float32 and rounded once.

    Args:
        x: floating-point tensor of any shape. The backward pass keeps nothing else.
        function: name of the function.
        **settings: arguments of the function beside `x`.
    """
    return _operation(x, function=function, **settings)
