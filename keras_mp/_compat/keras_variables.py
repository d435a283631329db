"""Keras variables: read without a cast, and half-precision ones that are read and written in float32."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

# Inside a layer's call a variable gives its value in the compute dtype; no public name switches that off.
from keras.src.backend.common.variables import AutocastScope as _AutocastScope
from keras.src.backend.common.variables import get_autocast_scope as _get_autocast_scope

from keras_mp._compat.execution import in_xla_context

__all__ = [
    "Float32View",
    "autocasts",
    "dtype_as_read",
    "reading_in",
    "set_path",
    "tensorflow_variable",
    "uncast",
    "without_autocast",
]


def uncast(variable: keras.Variable) -> tf.Tensor:
    """Returns the value of a variable in its stored dtype, also in a layer's call with another compute dtype.

    Args:
        variable: a Keras variable.
    """
    with without_autocast():
        return tf.convert_to_tensor(variable.value)


def tensorflow_variable(variable: Any) -> tf.Variable:
    """Returns the TensorFlow variable behind a Keras variable, or a TensorFlow variable itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


class Float32View:
    """A view of a half-precision variable that an optimizer's `update_step` reads and writes in float32.

    Keras finds a variable's slots by its `_unique_id`, and by no public name.

    Args:
        variable: the half-precision variable.
        optimizer: the optimizer that updates it.
    """

    dtype = tf.float32

    def __init__(self, variable: tf.Variable, optimizer: keras.optimizers.Optimizer) -> None:
        self._variable, self._unique_id = variable, optimizer._var_key(variable)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._variable, name)

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        """Returns the value in float32, or in the given dtype."""
        return tf.cast(self._variable, dtype or tf.float32, name)

    def assign(self, value: Any) -> None:
        """Rounds a value once. Overflow becomes the largest finite value, and NaN changes nothing."""
        value = tf.where(tf.math.is_nan(value), tf.convert_to_tensor(self), value)
        self._variable.assign(tf.saturate_cast(value, self._variable.dtype))

    def assign_add(self, value: Any) -> None:
        """Adds in float32."""
        self.assign(tf.convert_to_tensor(self) + value)

    def assign_sub(self, value: Any) -> None:
        """Subtracts in float32."""
        self.assign(tf.convert_to_tensor(self) - value)

    def scatter_add(self, rows: tf.IndexedSlices) -> None:
        """Adds rows in float32. Repeated rows are summed first."""
        if in_xla_context():  # XLA cannot know the number of different rows
            self.assign_add(tf.math.unsorted_segment_sum(rows.values, rows.indices, self._variable.shape[0]))
            return
        indices, places = tf.unique(rows.indices)
        sums = tf.math.unsorted_segment_sum(rows.values, places, tf.size(indices))
        self.scatter_update(tf.IndexedSlices(tf.cast(tf.gather(self._variable, indices), tf.float32) + sums, indices))

    def scatter_sub(self, rows: tf.IndexedSlices) -> None:
        """Subtracts rows in float32. Repeated rows are summed first."""
        self.scatter_add(tf.IndexedSlices(-rows.values, rows.indices, rows.dense_shape))

    def scatter_update(self, rows: tf.IndexedSlices) -> None:
        """Rounds rows once."""
        rounded = tf.saturate_cast(rows.values, self._variable.dtype)
        self._variable.scatter_update(tf.IndexedSlices(rounded, rows.indices))


def _operator_of_float32(name: str) -> Callable[..., Any]:
    return lambda view, *args: getattr(tf.convert_to_tensor(view), name)(*args)


for _name in tf.Tensor.OVERLOADABLE_OPERATORS:
    setattr(Float32View, _name, _operator_of_float32(_name))


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, variables are read and assigned in their stored dtype."""
    with _AutocastScope(None):
        yield


def set_path(variable: keras.Variable, path: str) -> None:
    """Sets the path of a variable. Keras makes it from the name scopes that are open at its creation."""
    variable._path = path


@contextlib.contextmanager
def reading_in(dtype: str, variable: keras.Variable) -> Iterator[None]:
    """Inside, a float variable that is otherwise read in its stored dtype is read in another one.

    Args:
        dtype: name of a float dtype.
        variable: a Keras variable.
    """
    before, variable._autocast = variable._autocast, True
    try:
        with _AutocastScope(dtype):
            yield
    finally:
        variable._autocast = before


def autocasts(variable: keras.Variable) -> bool:
    """Returns whether layers read the variable in their compute dtype."""
    return bool(variable._autocast)


def dtype_as_read(variable: keras.Variable) -> str:
    """Returns the dtype in which the current layer's call reads a variable, or its stored dtype outside a call."""
    scope = _get_autocast_scope()
    casts = autocasts(variable) and scope is not None and scope.dtype is not None
    return scope.dtype if casts and variable.dtype.startswith(("float", "bfloat")) else variable.dtype
