"""Activations that compute in float32 what 16 bits would round at every step, and answer in the dtype they get.

Each keeps only its 16-bit input, or output, for the backward pass and is compiled by XLA to one pass over memory where
that pays.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import backend, fusion

__all__ = ["gelu", "hard_silu", "log_softmax", "mish", "silu", "softmax", "softmax_in_one_pass"]


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


@keras.saving.register_keras_serializable(package="keras_mp")
def softmax(x: Any, axis: int | None = -1) -> Any:
    """Softmax computed in float32.

    A drop-in for `keras.activations.softmax`. The losses of `keras_mp.losses` find the logits behind the
    probabilities, as those of Keras do in float32. A row of -inf gives the uniform distribution, as in
    `keras_mp.layers.Softmax`.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64.
        axis: int, the axis that sums to one; None for all of them together. Defaults to -1.

    Returns:
        Probabilities of the shape and dtype of `x`.

    Raises:
        ValueError: if `axis` is out of bounds.

    Example:
        >>> import keras_mp
        >>> keras_mp.activations.softmax(tf.constant([[60000.0, 60000.0, 0.0]], "float16")).numpy().tolist()
        [[0.5, 0.5, 0.0]]

    The gradient is y * (g - sum(g * y)), as in Goodfellow, Bengio and Courville, "Deep Learning", 2016, section 6.2.
    """
    if isinstance(x, keras.KerasTensor):
        return _Symbolic("softmax", {"axis": axis})(x)
    x = keras.ops.convert_to_tensor(x)
    axes = _axes(x, axis)
    if not _is_16_bit(x):
        return keras.activations.softmax(x, axis=axis)
    return softmax_in_one_pass(x, axes=axes)


@keras.saving.register_keras_serializable(package="keras_mp")
def log_softmax(x: Any, axis: int | None = -1) -> Any:
    """Logarithm of the softmax, computed in float32.

    A drop-in for `keras.activations.log_softmax`. A row of -inf gives the logarithm of the uniform distribution.

    Args:
        x: logits of any shape; float16, bfloat16, float32 or float64.
        axis: int, the axis over which the probabilities sum to one; None for all together. Defaults to -1.

    Returns:
        Logarithms of probabilities, of the shape and dtype of `x`.

    Raises:
        ValueError: if `axis` is out of bounds.

    Example:
        >>> import keras_mp
        >>> keras_mp.activations.log_softmax(tf.constant([[300.0, 302.0]], "bfloat16")).numpy().tolist()
        [[-2.125, -0.126953125]]

    The gradient is g - softmax(x) * sum(g).
    """
    if isinstance(x, keras.KerasTensor):
        return _Symbolic("log_softmax", {"axis": axis})(x)
    x = keras.ops.convert_to_tensor(x)
    axes = _axes(x, axis)
    if not _is_16_bit(x):
        return keras.activations.log_softmax(x, axis=axis)
    return _log_softmax_in_one_pass(x, axes=axes)


@keras.saving.register_keras_serializable(package="keras_mp")
class _Symbolic(keras.Operation):
    """An activation as a node of a functional model, for when it is called with a `keras.Input`."""

    def __init__(self, function: str, settings: dict[str, Any], name: str | None = None) -> None:
        super().__init__(name=name)
        self.function, self.settings = function, settings

    def call(self, x: Any) -> Any:
        return globals()[self.function](x, **self.settings)

    def compute_output_spec(self, x: Any) -> Any:
        if "axis" in self.settings:
            _axes(x, self.settings["axis"])
        return keras.KerasTensor(x.shape, dtype=x.dtype)

    def get_config(self) -> dict[str, Any]:
        return {"function": self.function, "settings": self.settings, "name": self.name}


def _is_16_bit(x: Any) -> bool:
    return bool(x.dtype.is_floating and x.dtype.size == 2)


def _axes(x: Any, axis: int | None) -> tuple[int, ...]:
    """The axes that sum to one together, or Keras's error for one that is not there."""
    rank = len(x.shape)
    if axis is None:
        return tuple(range(rank))
    if not -rank <= axis < rank:
        raise ValueError(f"Axis {axis} is out of bounds for input shape {tuple(x.shape)}. Received: axis={axis}")
    return (axis % rank,)


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
    with tf.init_scope(), tf.device("CPU"):
        numbers = tf.bitcast(tf.constant(np.arange(1 << 16, dtype=np.uint16)), dtype)
        return np.asarray(of(tf.cast(numbers, tf.float64), function, dict(settings)))


def _looked_up(x: Any, of: Callable[..., Any], function: str, settings: Mapping[str, Any], dtype: Any) -> Any:
    """The same for 16-bit numbers out of the table, in a dtype, with the derivative that the formula has."""

    @tf.custom_gradient
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
    if isinstance(x, keras.KerasTensor):
        return _Symbolic(function, settings)(x)
    x = keras.ops.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise ValueError(
            f"`{function}` takes a tensor of a floating-point dtype. Received: x.dtype={x.dtype.name}. "
            'Cast it first: keras.ops.cast(x, "float32").'
        )
    return _elementwise_operation(x, function=function, **settings)


def _shifted(x: Any, axes: tuple[int, ...]) -> tuple[Any, Any]:
    """Logits in float32 less the largest of their row, and the sum of their exponentials.

    exp(x - logsumexp(x)) would round the logsumexp of large logits to their last digit. Nothing is below float32's
    lowest: a row of -inf would give -inf - -inf.
    """
    x = tf.maximum(tf.cast(x, tf.float32), tf.float32.min)
    x -= tf.stop_gradient(fusion.largest(x, axes))
    return x, fusion.total(tf.exp(x), axes)


def _softmax_in_float32(x: Any, axes: tuple[int, ...]) -> Any:
    x, total = _shifted(x, axes)
    return tf.exp(x) * (1.0 / total)


def _softmax_forward(x: Any, *, axes: tuple[int, ...]) -> Any:
    return tf.cast(_softmax_in_float32(x, axes), x.dtype)


def _softmax_backward(y: Any, upstream: Any, *, axes: tuple[int, ...]) -> Any:
    # y * (g - sum(g * y)), where 16 bits would round the confident y of a row to 1 and lose its gradient, which is that
    # 1 - y times a difference of g. The other y of the row know 1 - y: with their sum in place of 1 nothing is lost.
    wide, g = tf.cast(y, tf.float32), tf.cast(upstream, tf.float32)
    return tf.cast(wide * (g * fusion.total(wide, axes) - fusion.total(g * wide, axes)), y.dtype)


def _log_softmax_forward(x: Any, *, axes: tuple[int, ...]) -> Any:
    shifted, total = _shifted(x, axes)
    return tf.cast(shifted - tf.math.log(total), x.dtype)


def _log_softmax_backward(x: Any, upstream: Any, *, axes: tuple[int, ...]) -> Any:
    g = tf.cast(upstream, tf.float32)
    return tf.cast(g - _softmax_in_float32(x, axes) * fusion.total(g, axes), x.dtype)


def _softmax_by_kernel(x: Any, *, axes: tuple[int, ...]) -> Any:
    return tf.nn.softmax(x, axes[0])


_softmax_operation = fusion.operation(_softmax_forward, _softmax_backward, keeps_output=True)
_softmax_of_float32 = fusion.operation(_softmax_by_kernel, _softmax_backward, keeps_output=True, compiles_forward=False)
_log_softmax_in_one_pass = fusion.operation(_log_softmax_forward, _log_softmax_backward)


def softmax_in_one_pass(x: Any, axes: tuple[int, ...]) -> Any:
    """Softmax over one or several axes, computed in float32, of which only the answer is kept for the backward pass.

    Args:
        x: float16, bfloat16 or float32 logits of any shape.
        axes: the axes that sum to one together, counted from the front.

    Returns:
        Probabilities of the shape and dtype of `x`, with the logits attached where Keras's losses look for them.
    """
    by_kernel = x.dtype == tf.float32 and len(axes) == 1
    return backend.with_logits((_softmax_of_float32 if by_kernel else _softmax_operation)(x, axes=axes), x)
