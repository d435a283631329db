"""Recurrent layers whose states go from step to step in float32, whatever the dtype of the matrix products."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_layer_parts, keras_variables
from keras_mp.layers.recurrent.cells import (
    GRUCell,
    LSTMCell,
    SimpleRNNCell,
    StackedRNNCells,
    map_states,
    state_dtype,
)
from keras_mp.ops import matmul
from keras_mp.ops.recurrence import masked, recurrence, zero_unless

__all__ = ["GRU", "LSTM", "RNN", "SimpleRNN", "WideStates"]


class WideStates:
    """What the layers share: states go through `call` in float32. Keras's casts them to the compute dtype."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # an initial state is float32, and stays so

    def call(self: Any, sequences: Any, initial_state: Any = None, mask: Any = None, training: Any = False) -> Any:
        """Runs over the steps; see the class."""
        if self.unroll and sequences.shape[1] is None:  # from here on as in Keras, but for the dtypes
            raise ValueError(
                "Cannot unroll a RNN if the time dimension is undefined. \n"
                "- If using a Sequential model, specify the time dimension by passing an `Input()` as your first "
                "layer.\n"
                "- If using the functional API, specify the time dimension by passing a `shape` or `batch_shape` "
                "argument to your `Input()`."
            )
        expected = keras_layer_parts.expected_batch_size(self) if self.stateful else None
        if expected is not None and sequences.shape[0] not in (None, expected):
            raise ValueError(
                "If an RNN is stateful, the batch size of the input sequences must be the same as the batch size of "
                f"the initial state. \n- Expected batch size: {expected}\n"
                f"- Received batch size: {sequences.shape[0]}"
            )
        if initial_state is None and self.stateful:
            with keras_variables.without_autocast():
                initial_state = keras.tree.map_structure(tf.convert_to_tensor, self.states)
        elif initial_state is None:
            initial_state = self.get_initial_state(batch_size=tf.shape(sequences)[0])
        if not isinstance(initial_state, (list, tuple)):
            initial_state = [initial_state]
        initial_state = map_states(self.cell, list(initial_state), keras.ops.cast)
        sequences = tf.cast(sequences, self.compute_dtype)
        mask = _checked_mask(mask[0] if isinstance(mask, (list, tuple)) else mask, sequences)

        # The random masks are drawn before the loop, once for all steps.
        keras_layer_parts.config_dropout_masks(self, self.cell, sequences[:, 0, :], initial_state)
        unroll, self.unroll = self.unroll, self.unroll or self._is_followed_in_graph(sequences, initial_state)
        last_output, outputs, states = self.inner_loop(
            sequences=sequences, initial_state=initial_state, mask=mask, training=training
        )
        self.unroll = unroll
        keras_layer_parts.reset_dropout_masks(self, self.cell)
        states = list(states)
        if self.stateful:
            with keras_variables.without_autocast():
                for variable, state in zip(keras.tree.flatten(self.states), keras.tree.flatten(states), strict=True):
                    variable.assign(state)
        output = keras.ops.cast(outputs if self.return_sequences else last_output, self.compute_dtype)
        return (output, *states) if self.return_state else output

    def _is_followed_in_graph(self: Any, sequences: Any, initial_state: Any) -> bool:
        """Whether the loop must be written out, as a forward accumulator does not follow TensorFlow's in a graph."""
        if tf.executing_eagerly() or not execution.recording() or sequences.shape[1] is None:
            return False
        weights = [keras_variables.uncast(weight) for weight in self.weights]
        return execution.forward_mode(sequences, *keras.tree.flatten(initial_state), *weights)

    def compute_output_spec(self: Any, sequences: Any, *args: Any, **kwargs: Any) -> Any:
        """The output and the states as symbolic tensors, of which Keras would say that all have the compute dtype."""
        del args, kwargs
        shape = self.compute_output_shape(sequences.shape)
        shape, *states = shape if self.return_state else (shape,)
        output = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not self.return_state:
            return output
        return output, *map_states(self.cell, states, lambda shape, dtype: keras.KerasTensor(shape, dtype=dtype))


@keras.saving.register_keras_serializable(package="keras_mp")
class RNN(WideStates, keras.layers.RNN):
    """Runs a cell, or several one after the other, over a sequence, with float32 states between the steps.

    A drop-in for `keras.layers.RNN`, with the same arguments. It keeps in float32 the states of the cells of
    `keras_mp.layers`, and those of other cells in the compute dtype, as Keras does.

    Args:
        cell: a cell, or a list of cells to be stacked.
        return_sequences, return_state, go_backwards, stateful, unroll, zero_output_for_mask: bool, as in Keras.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        sequences: tensor of shape (batch, steps, features).
        initial_state: list of the states before the first step. Defaults to zeros.
        mask: bool tensor of shape (batch, steps), False where a step is to be passed over.
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units), or (batch, steps, units) with `return_sequences`, in the compute dtype; with
        `return_state`, followed by the last states, in float32 (float64 under that policy).

    Raises:
        ValueError: if `cell` is none; if the steps of an unrolled layer, or the batch of a stateful one, have no static
            size, or another than the layer was built for.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> cells = [keras_mp.layers.LSTMCell(4, dtype="mixed_bfloat16") for _ in range(2)]
        >>> rnn = keras_mp.layers.RNN(cells, return_sequences=True, dtype="mixed_bfloat16")
        >>> y = rnn(np.ones((2, 5, 3), "float32"))
        >>> y.shape, y.dtype
        (TensorShape([2, 5, 4]), tf.bfloat16)
    """

    def __init__(self, cell: Any, *args: Any, **kwargs: Any) -> None:
        # A list becomes Keras's own stack, which casts the states; each stack has the dtype policy in force.
        super().__init__(StackedRNNCells(cell) if isinstance(cell, (list, tuple)) else cell, *args, **kwargs)


class _Loop(WideStates):
    """What the layers with a cell of their own share: one product for all inputs, and a loop with its own gradient."""

    _cell_class: Any = None

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The constructor of the Keras layer has made the Keras cell. Ours differs from it in methods only, and to put
        # another in its place would leave the first, with the state of its random numbers, among the weights.
        cell = self.cell
        object.__setattr__(cell, "__class__", self._cell_class)
        cell.autocast = False
        if not self._by_cudnn():
            self.supports_jit = True

    def _by_cudnn(self: Any) -> bool:
        """Whether Keras's own loop is to be tried, that knows cuDNN: its states have the dtype of the inputs."""
        wanted = getattr(self, "use_cudnn", False)
        return bool(wanted) and (wanted is True or self.compute_dtype == state_dtype(self))

    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: Any = False) -> Any:
        """Runs the loop.

        Args:
            sequences: tensor of shape (batch, steps, features), in the compute dtype.
            initial_state: list of float32 tensors of shape (batch, units).
            mask: bool tensor of shape (batch, steps), or None.
            training: bool.

        Returns:
            The last output (None with `return_sequences`), all of them (None without), and the states.
        """
        cell = self.cell
        if self._by_cudnn() and (self.use_cudnn is True or not self.supports_jit):
            states = [tf.cast(state, self.compute_dtype) for state in initial_state]
            return super().inner_loop(sequences, states, mask=mask, training=training)  # type: ignore[misc]
        masks_by_gate = getattr(cell, "implementation", 2) == 1 and cell.dropout
        by_steps = (training and (cell.recurrent_dropout or masks_by_gate)) or not getattr(cell, "reset_after", True)
        if by_steps or self._is_followed_in_graph(sequences, initial_state):
            return keras.layers.RNN.inner_loop(self, sequences, initial_state, mask=mask, training=training)
        if training and 0 < cell.dropout < 1:
            sequences = masked(sequences, cell.get_dropout_mask(sequences[:, 0, :])[:, None], sequences.dtype)

        x = tf.transpose(sequences, [1, 0, 2])
        if mask is not None:
            mask = tf.transpose(tf.cast(mask, "bool"))[:, :, None]
        if self.go_backwards:
            x = tf.reverse(x, [0])
            mask = None if mask is None else tf.reverse(mask, [0])
        kernel = keras_variables.uncast(cell.kernel)
        factors = tf.reshape(x, [-1, x.shape[2]]), tf.cast(kernel, x.dtype)
        product = matmul.product(tf.matmul, *factors) if execution.recording() else tf.matmul(*factors)
        product = tf.reshape(product, [*keras.ops.shape(x)[:2], kernel.shape[1]])
        outputs, states = recurrence(
            cell,
            product,
            mask,
            keras_variables.uncast(cell.recurrent_kernel),
            cell.bias_of_sums(),
            initial_state,
            unroll=self.unroll,
            return_sequences=self.return_sequences,
        )
        if outputs is None:
            last_output = tf.cast(states[0], x.dtype)
            if mask is not None:  # the output of no step is 0, even where the state is not
                last_output = zero_unless(
                    mask[-1] if self.zero_output_for_mask else tf.reduce_any(mask, 0), last_output
                )
            return last_output, None, states
        if mask is not None:
            there = mask if self.zero_output_for_mask else tf.cumsum(tf.cast(mask, "int32"), 0) > 0
            outputs = zero_unless(there, outputs)
        return None, tf.transpose(outputs, [1, 0, 2]), states


@keras.saving.register_keras_serializable(package="keras_mp")
class LSTM(_Loop, keras.layers.LSTM):
    """Long short-term memory whose cell state is summed in float32.

    A drop-in for `keras.layers.LSTM`, with the same arguments and weights. The products have the compute dtype. All
    else, from their sum to the states, is float32, so that a cell state goes on growing where increments are below its
    last 16-bit digit, and does not end at 65504. The gradient to the recurrent kernel is one product over all steps,
    rounded once; Keras's is the sum of as many rounded products as there are steps.

    Args:
        units: int, the size of the output and of both states.
        *args, **kwargs: as in Keras, in the same order. With `use_cudnn="auto"` cuDNN runs float32 layers only, for its
            states have the dtype of its inputs; with True, all.

    Call arguments:
        sequences: tensor of shape (batch, steps, features); float16, bfloat16, float32, float64 or integers.
        initial_state: list of the output and the cell state before the first step. Defaults to zeros.
        mask: bool tensor of shape (batch, steps), False where a step is to be passed over.
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units), or (batch, steps, units) with `return_sequences`, in the compute dtype; with
        `return_state`, followed by both states, in float32 (float64 under that policy).

    Raises:
        ValueError: if `units` is not positive; if the steps of an unrolled layer, or the batch of a stateful one, have
            no static size, or another than the layer was built for; if `use_cudnn` is True and cuDNN cannot.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.LSTM(4, return_state=True, dtype="mixed_bfloat16")
        >>> y, h, c = layer(np.ones((2, 1000, 3), "float32"))
        >>> y.dtype, c.dtype
        (tf.bfloat16, tf.float32)

    The formula is that of `LSTMCell`. Its gradient runs back over the steps with the sums of the gates, kept in the
    compute dtype, and the float32 cell states: backpropagation through time, Werbos, 1990,
    https://doi.org/10.1109/5.58337.
    """

    _cell_class = LSTMCell


@keras.saving.register_keras_serializable(package="keras_mp")
class GRU(_Loop, keras.layers.GRU):
    """Gated recurrent units whose state is float32.

    A drop-in for `keras.layers.GRU`, with the same arguments and weights. The products have the compute dtype. All
    else, from their sum to the state, is float32, so that a state moves where its steps are below its last 16-bit
    digit. The gradient to the recurrent kernel is one product over all steps, rounded once; Keras's is the sum of as
    many rounded products as there are steps.

    Args:
        units: int, the size of the output, which is the state.
        *args, **kwargs: as in Keras, in the same order. With `use_cudnn="auto"` cuDNN runs float32 layers only, for its
            state has the dtype of its inputs; with True, all.

    Call arguments:
        sequences: tensor of shape (batch, steps, features); float16, bfloat16, float32, float64 or integers.
        initial_state: the state before the first step, or a list of it. Defaults to zeros.
        mask: bool tensor of shape (batch, steps), False where a step is to be passed over.
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units), or (batch, steps, units) with `return_sequences`, in the compute dtype; with
        `return_state`, followed by the last state, in float32 (float64 under that policy).

    Raises:
        ValueError: if `units` is not positive; if the steps of an unrolled layer, or the batch of a stateful one, have
            no static size, or another than the layer was built for; if `use_cudnn` is True and cuDNN cannot.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.GRU(4, return_sequences=True, dtype="mixed_float16")
        >>> y = layer(np.ones((2, 1000, 3), "float32"))
        >>> y.shape, y.dtype
        (TensorShape([2, 1000, 4]), tf.float16)

    The formula is that of `GRUCell`, the gradient backpropagation through time as in `LSTM`.
    """

    _cell_class = GRUCell


@keras.saving.register_keras_serializable(package="keras_mp")
class SimpleRNN(_Loop, keras.layers.SimpleRNN):
    """A recurrent layer without gates that sums and activates in float32.

    A drop-in for `keras.layers.SimpleRNN`, with the same arguments and weights. The products have the compute dtype, so
    the state, which goes from step to step through one of them only, has its digits. What this layer mends is the
    rounding of the sum, twice a step, and of the gradients to the weights, once a step: those are one product, or
    float32 sum, over all steps. A state that has to last for hundreds of steps belongs into `LSTM` or `GRU`.

    Args:
        units: int, the size of the output, which is the state.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        sequences: tensor of shape (batch, steps, features); float16, bfloat16, float32, float64 or integers.
        initial_state: the state before the first step, or a list of it. Defaults to zeros.
        mask: bool tensor of shape (batch, steps), False where a step is to be passed over.
        training: bool, whether to drop out.

    Returns:
        Tensor of shape (batch, units), or (batch, steps, units) with `return_sequences`, in the compute dtype; with
        `return_state`, followed by the last state, in float32 (float64 under that policy).

    Raises:
        ValueError: if `units` is not positive; if the steps of an unrolled layer, or the batch of a stateful one, have
            no static size, or another than the layer was built for.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.SimpleRNN(4, dtype="mixed_bfloat16")
        >>> layer(np.ones((2, 5, 3), "float32")).dtype
        tf.bfloat16

    The formula is that of `SimpleRNNCell`, the gradient backpropagation through time as in `LSTM`.
    """

    _cell_class = SimpleRNNCell


def _checked_mask(mask: Any, sequences: Any) -> Any:
    """The mask, of shape (batch, steps), or an error where it is not of the steps."""
    if mask is None:
        return None
    mask = tf.convert_to_tensor(mask)
    if mask.shape.rank == 3 and mask.shape[2] == 1:  # as Keras's loop takes it, too
        mask = tf.squeeze(mask, 2)
    # Of images, what `Masking` makes has a row or a pixel masked.
    fits = mask.shape[:2].is_compatible_with(sequences.shape[:2]) and mask.shape.rank < sequences.shape.rank
    if not fits:
        raise ValueError(
            f"The `mask` must be of shape (batch_size, steps), here {tuple(sequences.shape[:2])}. "
            f"Received: sequences.shape={tuple(sequences.shape)}, mask.shape={tuple(mask.shape)}"
        )
    return mask
