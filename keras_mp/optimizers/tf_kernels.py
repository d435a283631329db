"""Updates of weights by TensorFlow's own kernels, each of which does all that an optimizer does to a variable in place.

Adam, op by op, passes over the weights a dozen times. Compiled by XLA it takes as long as by these kernels, but the
compiler takes seconds and, for a network of a few hundred variables, hundreds of MiB that the process keeps.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_optimizers, keras_variables
from keras_mp.optimizers import half_variables

__all__ = ["by_kernels", "dense", "has_kernel", "keeps_rows"]

_DTYPES = ("float32", "float64")
_LARGE = 1 << 16
# Of the square of a sum of gradients, what the sum of their squares is taken for at least: see `_add_squares`.
_LEAST_SHARE = 2.0**-18
# From a gradient, a variable and a learning rate to the op that updates the variable; None in eager code.
_Kernel = Callable[["tf.Tensor | tf.IndexedSlices", tf.Variable, tf.Tensor], "tf.Operation | None"]
_Prepare = Callable[[Any, Any], Any]


def has_kernel(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether TensorFlow has a kernel for what this very optimizer does to a variable.

    Args:
        optimizer: without loss scaling; of several, each has to have one.

    Example:
        >>> has_kernel(keras.optimizers.Adam()), has_kernel(keras.optimizers.Nadam())
        (True, False)
    """
    return all(
        type(each) in _KERNELS and not getattr(each, "amsgrad", False) and getattr(each, "beta_2", 1.0)
        for each in _parts(optimizer)
    )


@contextlib.contextmanager
def by_kernels(
    optimizer: keras.optimizers.Optimizer, prepared: _Prepare, sum_repeated_ids: bool = False
) -> Iterator[None]:
    """Inside, the optimizer updates variables in float32 and float64 by TensorFlow's kernels.

    What it does beside, as clipping, weight decay, accumulation and averages, is Keras's as before. Large gradients are
    prepared, and sparse ones, other than of plain gradient descent, made dense, one after the other, so that no more
    than two of what that makes are in memory.

    Args:
        optimizer: one that `has_kernel`.
        prepared: from a gradient that `optimizer.apply` is given inside, and its variable, to the one that is meant.
        sum_repeated_ids: whether gradients of a row that comes several times are added up before they are squared. Else
            their squares are added up, as Keras does.
    """
    with half_variables.replaced_update_steps(_parts(optimizer), lambda part: _step(part, prepared, sum_repeated_ids)):
        yield


def keeps_rows(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether the optimizer leaves the rows of a variable as they are of which a sparse gradient says nothing."""
    return type(optimizer) is keras.optimizers.SGD and not optimizer.momentum


def dense(gradient: tf.IndexedSlices) -> tf.Tensor:
    """A sparse gradient as a tensor, with rows that come twice added up in float32 at least."""
    values = gradient.values if gradient.values.dtype.size >= 4 else tf.cast(gradient.values, tf.float32)
    return tf.math.unsorted_segment_sum(values, gradient.indices, gradient.dense_shape[0])


def _parts(optimizer: keras.optimizers.Optimizer) -> Sequence[keras.optimizers.Optimizer]:
    return getattr(optimizer, "optimizers", None) or [optimizer]


def _step(
    optimizer: keras.optimizers.Optimizer, prepared: _Prepare, sum_repeated_ids: bool
) -> Callable[[Any, Any, Any], None]:
    """What takes the place of the optimizer's `update_step`."""
    of_keras, kernel = optimizer.update_step, _KERNELS[type(optimizer)](optimizer, sum_repeated_ids)
    large: list[tf.Operation] = []

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        there = keras_variables.tensorflow_variable(variable)
        is_sparse, is_large = isinstance(gradient, tf.IndexedSlices), math.prod(there.shape) >= _LARGE
        # The next but one waits: while the kernel passes over one variable, the next gradient is prepared.
        with tf.control_dependencies(large[-2:-1] if is_large else []):
            gradient = prepared(gradient, variable)
            if is_sparse and sum_repeated_ids and not keeps_rows(optimizer):
                gradient, is_sparse = dense(gradient), False
            if there.dtype.name not in _DTYPES or (is_sparse and keeps_rows(optimizer)):
                of_keras(gradient, variable, learning_rate)
                return
            gradient = tf.cast(gradient, there.dtype)
        done = kernel(gradient, there, tf.cast(learning_rate, there.dtype))
        if is_large and done is not None:
            large.append(done)

    return update_step


def _adam(optimizer: Any, sum_repeated_ids: bool) -> _Kernel:
    """Kingma and Ba, 2015, section 2, in the order of computation of its last paragraph, as Keras.

    The kernel takes 1 - beta_2 in the dtype of the variable, of the same beta_2 as the correction of the bias, where
    Keras takes the one exactly and the other not: squares differ by 1.3e-5 of theirs in float32, and the first step of
    Keras's is by half of that too short.
    """
    steps = optimizer.iterations + 1
    powers: dict[str, tuple[tf.Tensor, tf.Tensor]] = {}
    for dtype in _DTYPES:
        count = tf.cast(steps, dtype)
        powers[dtype] = (
            tf.pow(tf.constant(optimizer.beta_1, dtype), count),
            tf.pow(tf.constant(optimizer.beta_2, dtype), count),
        )

    def update(
        gradient: "tf.Tensor | tf.IndexedSlices", variable: tf.Variable, learning_rate: tf.Tensor
    ) -> "tf.Operation | None":
        number = gradient.dtype.as_numpy_dtype
        momentum = keras_optimizers.slot_of(optimizer, "momentums", variable)
        beta_1_power, beta_2_power = powers[gradient.dtype.name]
        velocity = keras_variables.tensorflow_variable(keras_optimizers.slot_of(optimizer, "velocities", variable))
        if isinstance(gradient, tf.IndexedSlices):
            gradient = dense(_add_squares(gradient, velocity, float(number(optimizer.beta_2))))
        return tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=keras_variables.tensorflow_variable(momentum).handle,
            v=velocity.handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=learning_rate,
            beta1=number(optimizer.beta_1),
            beta2=number(optimizer.beta_2),
            epsilon=number(optimizer.epsilon),
            grad=gradient,
        )

    return update


def _add_squares(gradient: tf.IndexedSlices, velocity: tf.Variable, beta_2: float) -> tf.IndexedSlices:
    """Has a kernel that averages the squares of a dense gradient average the sums of the squares of a sparse one.

    The two differ in rows that come several times, by what is added to the average here, before the kernel. The kernel
    then adds the square of the sum, which is what is subtracted here, up to rounding. The sum of squares is no less
    than that square over the number of rows; a least share of it keeps the rounding from making an average negative.

    Returns:
        The gradient with each row once, in the very sums whose squares were subtracted.
    """
    rows, places = tf.unique(gradient.indices)
    sums = tf.math.unsorted_segment_sum(gradient.values, places, tf.size(rows))
    sum_of_squares = tf.math.unsorted_segment_sum(tf.square(gradient.values), places, tf.size(rows))
    missing = tf.maximum(sum_of_squares, _LEAST_SHARE * tf.square(sums)) - tf.square(sums)
    velocity.scatter_add(tf.IndexedSlices(missing * ((1 - beta_2) / beta_2), rows))
    return tf.IndexedSlices(sums, rows, gradient.dense_shape)


def _descent(optimizer: Any, sum_repeated_ids: bool) -> _Kernel:
    """Gradient descent, with Keras's order of momentum and learning rate. It squares nothing."""

    def update(
        gradient: "tf.Tensor | tf.IndexedSlices", variable: tf.Variable, learning_rate: tf.Tensor
    ) -> "tf.Operation | None":
        gradient = dense(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient
        if not optimizer.momentum:
            return tf.raw_ops.ResourceApplyGradientDescent(var=variable.handle, alpha=learning_rate, delta=gradient)
        return tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=keras_variables.tensorflow_variable(
                keras_optimizers.slot_of(optimizer, "momentums", variable)
            ).handle,
            lr=learning_rate,
            grad=gradient,
            momentum=gradient.dtype.as_numpy_dtype(optimizer.momentum),
            use_nesterov=optimizer.nesterov,
        )

    return update


_KERNELS: dict[type, Callable[[Any, bool], _Kernel]] = {
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
    keras.optimizers.SGD: _descent,
}
