"""Recurrent cells whose state is a float32 sum, whatever the dtype of the matrix products."""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_variables
from keras_mp.ops import fusion
from keras_mp.ops.recurrence import masked_product

__all__ = ["Cell", "GRUCell", "LSTMCell", "SimpleRNNCell", "StackedRNNCells", "map_states", "state_dtype"]


class Cell:
    """What the cells share: 16-bit products, float32 between them.

    A cell adds up `sums`, of what the input and the state before contribute to each gate, and makes new states of them
    in `gates`. Both are functions of tensors without weights, so that a layer can run them in a loop of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # the states that come are float32, and stay so

    @property
    def wide_dtype(self) -> str:
        """The dtype of states and gates."""
        return state_dtype(self)

    def get_initial_state(self: Any, batch_size: Any = None) -> list[Any]:
        """Zeros, in float32 or float64."""
        sizes = self.state_size if isinstance(self.state_size, (list, tuple)) else [self.state_size]
        return [keras.ops.zeros((batch_size, size), dtype=state_dtype(self)) for size in sizes]

    def get_dropout_mask(self: Any, step_input: Any) -> Any:
        """Keras's mask for the inputs, drawn in float32, as the share that drops out is another in 16 bits."""
        return super().get_dropout_mask(tf.cast(step_input, state_dtype(self)))  # type: ignore[misc]

    def bias_of_sums(self: Any) -> Any:
        """What is added to `sums`, in float32, or None."""
        return tf.cast(keras_variables.uncast(self.bias), state_dtype(self)) if self.use_bias else None

    def sums(self, x: Any, r: Any) -> Any:
        """What goes into the gates, of the products with the input and with the state before."""
        return x + r

    def to_products(self, to_sums: Any) -> tuple[Any, Any]:
        """The gradients to both products, of that to `sums`."""
        return to_sums, to_sums

    def project(self: Any, inputs: Any, training: Any) -> Any:
        """The product of inputs, of one step or of as many as there are, with the kernel."""
        inputs = tf.cast(inputs, self.compute_dtype)
        masks = self.get_dropout_mask(inputs) if training and 0 < self.dropout < 1 else None
        return masked_product(inputs, keras_variables.uncast(self.kernel), masks)

    def _recur(self: Any, h: Any, training: Any) -> Any:
        """The product of the state with the recurrent kernel."""
        masks = self.get_recurrent_dropout_mask(h) if training and 0 < self.recurrent_dropout < 1 else None
        return masked_product(h, keras_variables.uncast(self.recurrent_kernel), masks, self.compute_dtype)

    def _step(self: Any, inputs: Any, states: Any, training: Any) -> tuple[Any, Any]:
        given = list(states) if isinstance(states, (list, tuple)) else [states]
        wide = [tf.cast(state, state_dtype(self)) for state in given]
        x = tf.cast(self.project(inputs, training), state_dtype(self))
        new = self._new_states(x, wide, training)
        # In the dtype in which they came: a loop, as that of Keras's own `RNN`, has to find what it gave.
        answer = [tf.cast(state, old.dtype) for state, old in zip(new, given, strict=True)]
        return tf.cast(new[0], self.compute_dtype), answer if isinstance(states, (list, tuple)) else answer[0]

    def _new_states(self: Any, x: Any, states: list[Any], training: Any) -> list[Any]:
        sums = self.sums(x, tf.cast(self._recur(states[0], training), state_dtype(self)))
        bias = self.bias_of_sums()
        return list(self.gates(sums if bias is None else sums + bias, *states))


@keras.saving.register_keras_serializable(package="keras_mp")
class LSTMCell(Cell, keras.layers.LSTMCell):
    """One step of `LSTM`, for `RNN`, with a float32 state.

    A drop-in for `keras.layers.LSTMCell`, with the same arguments and weights. The products with both kernels have the
    compute dtype; their sum, the gates and the states are float32. Run it with `keras_mp.layers.RNN`: that of Keras
    rounds the states to 16 bits from step to step.

    Args:
        units: int, the size of the output and of both states.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        inputs: tensor of shape (batch, features).
        states: list of the output and the cell state of the step before, both of shape (batch, units).
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units) in the compute dtype, and the list of new states, in the dtypes of `states`.

    Raises:
        ValueError: if `units` is not positive.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> cell = keras_mp.layers.LSTMCell(4, dtype="mixed_bfloat16")
        >>> y, (h, c) = cell(np.ones((2, 3), "float32"), cell.get_initial_state(2))
        >>> y.dtype, h.dtype, c.dtype
        (tf.bfloat16, tf.float32, tf.float32)

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997, https://doi.org/10.1162/neco.1997.9.8.1735, with the
    forget gate of Gers, Schmidhuber and Cummins, 2000.
    """

    def gates(self: Any, sums: Any, h: Any, c: Any) -> tuple[Any, Any]:
        """The new output and cell state."""
        del h
        i, f, g, o = tf.split(sums, 4, -1)
        c = self.recurrent_activation(f) * c + self.recurrent_activation(i) * self.activation(g)
        return self.recurrent_activation(o) * self.activation(c), c

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """Makes one step; see the class."""
        return self._step(inputs, states, training)


@keras.saving.register_keras_serializable(package="keras_mp")
class GRUCell(Cell, keras.layers.GRUCell):
    """One step of `GRU`, for `RNN`, with a float32 state.

    A drop-in for `keras.layers.GRUCell`, with the same arguments and weights. The products with both kernels have the
    compute dtype; their sum, the gates and the state are float32. Run it with `keras_mp.layers.RNN`: that of Keras
    rounds the state to 16 bits from step to step.

    Args:
        units: int, the size of the output, which is the state.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        inputs: tensor of shape (batch, features).
        states: the state of the step before, of shape (batch, units), or a list of it.
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units) in the compute dtype, and the new state as `states` was given, in its dtype.

    Raises:
        ValueError: if `units` is not positive.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> cell = keras_mp.layers.GRUCell(4, dtype="mixed_bfloat16")
        >>> y, (h,) = cell(np.ones((2, 3), "float32"), cell.get_initial_state(2))
        >>> y.dtype, h.dtype
        (tf.bfloat16, tf.float32)

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, https://arxiv.org/abs/1406.1078; with
    `reset_after` as in cuDNN.
    """

    def bias_of_sums(self: Any) -> Any:
        """What is added to `sums`, in float32, or None."""
        bias = super().bias_of_sums()
        if bias is None or not self.reset_after:
            return bias
        of_input, of_state = tf.unstack(bias)
        both, last = 2 * self.units, [self.units]
        return tf.concat([of_input[:both] + of_state[:both], fusion.shaped(of_input[both:], last), of_state[both:]], 0)

    def sums(self: Any, x: Any, r: Any) -> Any:
        """Those of the update and the reset gate, and the two parts of the candidate, between which the reset stands.

        The first three lie as in `x`.
        """
        both = 2 * self.units
        return tf.concat([x[:, :both] + r[:, :both], x[:, both:], r[:, both:]], -1)

    def to_products(self: Any, to_sums: Any) -> tuple[Any, Any]:
        """The gradients to both products, of that to `sums`."""
        both, to_state = to_sums[:, : 2 * self.units], to_sums[:, 3 * self.units :]
        return to_sums[:, : 3 * self.units], tf.concat([both, to_state], -1)

    def gates(self: Any, sums: Any, h: Any) -> tuple[Any]:
        """The new state."""
        z, r, of_input, of_state = tf.split(sums, 4, -1)
        candidate = self.activation(of_input + self.recurrent_activation(r) * of_state)
        z = self.recurrent_activation(z)
        return (z * h + (1 - z) * candidate,)

    def _new_states(self: Any, x: Any, states: list[Any], training: Any) -> list[Any]:
        if self.reset_after:
            return super()._new_states(x, states, training)
        (h,) = states
        bias = self.bias_of_sums()
        z, r, of_input = tf.split(x if bias is None else x + bias, 3, -1)
        dropped = training and 0 < self.recurrent_dropout < 1
        masks: Any = self.get_recurrent_dropout_mask(h) if dropped else [1.0] * 3
        kernels = tf.split(keras_variables.uncast(self.recurrent_kernel), 3, 1)

        def product(h: Any, part: int) -> Any:
            return tf.cast(masked_product(h * masks[part], kernels[part], None, self.compute_dtype), state_dtype(self))

        z = self.recurrent_activation(z + product(h, 0))
        r = self.recurrent_activation(r + product(h, 1))
        candidate = self.activation(of_input + product(r * h, 2))
        return [z * h + (1 - z) * candidate]

    def call(self, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """Makes one step; see the class."""
        return self._step(inputs, states, training)


@keras.saving.register_keras_serializable(package="keras_mp")
class SimpleRNNCell(Cell, keras.layers.SimpleRNNCell):
    """One step of `SimpleRNN`, for `RNN`, with a float32 state.

    A drop-in for `keras.layers.SimpleRNNCell`, with the same arguments and weights. The products with both kernels have
    the compute dtype; their sum and the activation are float32.

    Args:
        units: int, the size of the output, which is the state.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        sequence: tensor of shape (batch, features).
        states: the state of the step before, of shape (batch, units), or a list of it.
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units) in the compute dtype, and the new state as `states` was given, in its dtype.

    Raises:
        ValueError: if `units` is not positive.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> cell = keras_mp.layers.SimpleRNNCell(4, dtype="mixed_bfloat16")
        >>> y, (h,) = cell(np.ones((2, 3), "float32"), cell.get_initial_state(2))
        >>> y.dtype, h.dtype
        (tf.bfloat16, tf.float32)

    Elman, "Finding Structure in Time", 1990, https://doi.org/10.1207/s15516709cog1402_1.
    """

    def gates(self: Any, sums: Any, h: Any) -> tuple[Any]:
        """The new state."""
        del h
        return (sums if self.activation is None else self.activation(sums),)

    def call(self, sequence: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """Makes one step; see the class."""
        return self._step(sequence, states, training)


@keras.saving.register_keras_serializable(package="keras_mp")
class StackedRNNCells(keras.layers.StackedRNNCells):
    """Cells one after the other, each with its float32 state.

    A drop-in for `keras.layers.StackedRNNCells`, with the same argument. Keras's casts the states to 16 bits on their
    way to the cells.

    Args:
        cells: list of cells.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, features).
        states: list of the states of each cell.
        training: bool, whether to drop out.

    Returns:
        The output of the last cell, and the list of new states.

    Raises:
        ValueError: if what should be a cell has no `call` method or no `state_size`.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> cells = [keras_mp.layers.GRUCell(size, dtype="mixed_bfloat16") for size in (4, 2)]
        >>> rnn = keras_mp.layers.RNN(keras_mp.layers.StackedRNNCells(cells), dtype="mixed_bfloat16")
        >>> rnn(np.ones((2, 5, 3), "float32")).shape
        TensorShape([2, 2])
    """

    def __init__(self, cells: Any, **kwargs: Any) -> None:
        super().__init__(cells, **kwargs)
        self.autocast = False  # the states that come are float32, and stay so


def state_dtype(layer: Any) -> str:
    """The dtype of states and gates."""
    return str(keras.backend.result_type(layer.compute_dtype, "float32"))


def map_states(cell: Any, states: Any, function: Callable[[Any, str], Any]) -> Any:
    """The answers of a function to each state, or its shape, and the dtype that the cell carries it in."""
    if isinstance(cell, StackedRNNCells):
        return [map_states(each, state, function) for each, state in zip(cell.cells, states, strict=True)]
    dtype = state_dtype(cell) if isinstance(cell, Cell) else cell.compute_dtype
    several = isinstance(states, list) or (isinstance(states, tuple) and not isinstance(states[-1], int))
    return [function(state, dtype) for state in states] if several else function(states, dtype)
