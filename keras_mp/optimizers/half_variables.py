"""Variables of 16 bits: an optimizer keeps its slots for them, and computes with them, in float32.

In float16 an epsilon of 1e-7 rounds to 0 and the square of 256 overflows; in bfloat16 a decay of 0.999 rounds to 1. So
finite gradients would become NaN, or change nothing.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_optimizers, keras_variables

__all__ = ["float32_slots", "in_float32", "is_narrow", "replaced_update_steps"]


def is_narrow(variable: Any) -> bool:
    """Whether a variable is held in 16 bits.

    Args:
        variable: of Keras or TensorFlow.
    """
    dtype = tf.as_dtype(keras_variables.tensorflow_variable(variable).dtype)
    return bool(dtype.is_floating and dtype.size == 2)


def float32_slots() -> contextlib.AbstractContextManager[None]:
    """Inside, Keras's optimizers make the slots of half-precision variables in float32.

    Averages of the weights keep the dtype of the weights, which they replace.
    """

    def dtype_of(dtype: str, name: str | None) -> str:
        narrow = dtype in ("float16", "bfloat16") and not str(name).endswith("_average")
        return "float32" if narrow else dtype

    return keras_optimizers.adding_variables_in(dtype_of)


@contextlib.contextmanager
def in_float32(optimizers: Sequence[keras.optimizers.Optimizer], variables: Sequence[keras.Variable]) -> Iterator[None]:
    """Inside, optimizers update variables of 16 bits in float32, and round what comes of it once.

    Args:
        optimizers: each without others in it.
        variables: what they update.
    """
    narrow = [variable for variable in variables if is_narrow(variable)]
    if not narrow:
        yield
        return

    def step(optimizer: keras.optimizers.Optimizer) -> Callable[[Any, Any, Any], None]:
        of_keras = optimizer.update_step

        def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
            there = keras_variables.tensorflow_variable(variable)
            of_keras(
                gradient, keras_variables.Float32View(there, optimizer) if is_narrow(there) else variable, learning_rate
            )

        return update_step

    constraints = [(variable, getattr(variable, "constraint", None)) for variable in narrow]
    try:
        for variable, constraint in constraints:
            if constraint is not None:
                variable.constraint = _rounded(constraint)
        with replaced_update_steps(optimizers, step):
            yield
    finally:
        for variable, constraint in constraints:
            if constraint is not None:
                variable.constraint = constraint


@contextlib.contextmanager
def replaced_update_steps(
    optimizers: Sequence[keras.optimizers.Optimizer],
    step: Callable[[keras.optimizers.Optimizer], Callable[[Any, Any, Any], None]],
) -> Iterator[None]:
    """Inside, optimizers have another `update_step`.

    Args:
        optimizers: each without others in it.
        step: from one of them to what takes the place of its `update_step`.
    """
    before = [(optimizer, vars(optimizer).get("update_step")) for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.update_step = step(optimizer)
    try:
        yield
    finally:
        for optimizer, own in before:
            if own is None:
                del optimizer.update_step
            else:
                optimizer.update_step = own


def _rounded(constraint: Callable[[Any], Any]) -> Callable[[Any], tf.Tensor]:
    def constrained(variable: Any) -> tf.Tensor:
        there = keras_variables.tensorflow_variable(variable)
        return tf.saturate_cast(constraint(tf.cast(there, tf.float32)), there.dtype)

    return constrained
