"""Recurrent layers and cells whose state is a float32 sum, whatever the dtype of the matrix products."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_layer_parts, keras_variables
from keras_mp.ops import fusion, matmul

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUCell",
    "LSTMCell",
    "SimpleRNN",
    "SimpleRNNCell",
    "StackedRNNCells",
    "WideStates",
    "masked",
]


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
        return _wide(self)

    def get_initial_state(self: Any, batch_size: Any = None) -> list[Any]:
        """Zeros, in float32 or float64."""
        sizes = self.state_size if isinstance(self.state_size, (list, tuple)) else [self.state_size]
        return [keras.ops.zeros((batch_size, size), dtype=_wide(self)) for size in sizes]

    def get_dropout_mask(self: Any, step_input: Any) -> Any:
        """Keras's mask for the inputs, drawn in float32, as the share that drops out is another in 16 bits."""
        return super().get_dropout_mask(tf.cast(step_input, _wide(self)))  # type: ignore[misc]

    def bias_of_sums(self: Any) -> Any:
        """What is added to `sums`, in float32, or None."""
        return tf.cast(keras_variables.uncast(self.bias), _wide(self)) if self.use_bias else None

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
        return _product(inputs, keras_variables.uncast(self.kernel), masks)

    def _recur(self: Any, h: Any, training: Any) -> Any:
        """The product of the state with the recurrent kernel."""
        masks = self.get_recurrent_dropout_mask(h) if training and 0 < self.recurrent_dropout < 1 else None
        return _product(h, keras_variables.uncast(self.recurrent_kernel), masks, self.compute_dtype)

    def _step(self: Any, inputs: Any, states: Any, training: Any) -> tuple[Any, Any]:
        given = list(states) if isinstance(states, (list, tuple)) else [states]
        wide = [tf.cast(state, _wide(self)) for state in given]
        x = tf.cast(self.project(inputs, training), _wide(self))
        new = self._new_states(x, wide, training)
        # In the dtype in which they came: a loop, as that of Keras's own `RNN`, has to find what it gave.
        answer = [tf.cast(state, old.dtype) for state, old in zip(new, given, strict=True)]
        return tf.cast(new[0], self.compute_dtype), answer if isinstance(states, (list, tuple)) else answer[0]

    def _new_states(self: Any, x: Any, states: list[Any], training: Any) -> list[Any]:
        sums = self.sums(x, tf.cast(self._recur(states[0], training), _wide(self)))
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
            return tf.cast(_product(h * masks[part], kernels[part], None, self.compute_dtype), _wide(self))

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
        initial_state = _map_states(self.cell, list(initial_state), keras.ops.cast)
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
        return output, *_map_states(self.cell, states, lambda shape, dtype: keras.KerasTensor(shape, dtype=dtype))


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
        return bool(wanted) and (wanted is True or self.compute_dtype == _wide(self))

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
        outputs, states = _recurrence(
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
                last_output = _zero_unless(
                    mask[-1] if self.zero_output_for_mask else tf.reduce_any(mask, 0), last_output
                )
            return last_output, None, states
        if mask is not None:
            there = mask if self.zero_output_for_mask else tf.cumsum(tf.cast(mask, "int32"), 0) > 0
            outputs = _zero_unless(there, outputs)
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


def _wide(layer: Any) -> str:
    """The dtype of states and gates."""
    return str(keras.backend.result_type(layer.compute_dtype, "float32"))


def _map_states(cell: Any, states: Any, function: Callable[[Any, str], Any]) -> Any:
    """The answers of a function to each state, or its shape, and the dtype that the cell carries it in."""
    if isinstance(cell, StackedRNNCells):
        return [_map_states(each, state, function) for each, state in zip(cell.cells, states, strict=True)]
    dtype = _wide(cell) if isinstance(cell, Cell) else cell.compute_dtype
    several = isinstance(states, list) or (isinstance(states, tuple) and not isinstance(states[-1], int))
    return [function(state, dtype) for state in states] if several else function(states, dtype)


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


def _zero_unless(there: Any, x: Any) -> Any:
    return tf.where(there, x, tf.zeros([], x.dtype))


def masked(x: Any, mask: Any, dtype: Any) -> Any:
    """What dropout leaves of `x`, multiplied in the dtype of the mask and rounded once."""
    return tf.cast(tf.cast(x, mask.dtype) * mask, dtype)


def _product(x: Any, kernel: Any, masks: Any, dtype: Any = None) -> Any:
    """`x @ kernel`, rounded to 16 bits; with a list of masks, one for each gate, the products of the masked `x`."""
    dtype = dtype or x.dtype
    if masks is None or not isinstance(masks, (list, tuple)):
        x = tf.cast(x, dtype) if masks is None else masked(x, masks, dtype)
        return tf.matmul(x, tf.cast(kernel, dtype))
    kernels = tf.split(tf.cast(kernel, dtype), len(masks), 1)
    return tf.concat([tf.matmul(masked(x, mask, dtype), part) for mask, part in zip(masks, kernels, strict=True)], -1)


def _loop(steps: Any, body: Callable[..., Sequence[Any]], variables: Sequence[Any], unroll: bool) -> Sequence[Any]:
    """Calls `body` with the number of each step and what it has answered the step before."""
    if unroll:
        for step in range(steps):
            variables = body(step, *variables)
        return variables
    # XLA needs the limit where it differentiates the loop, for a second derivative.
    return tf.while_loop(
        lambda step, *_: step < steps,
        lambda step, *variables: (step + 1, *body(step, *variables)),
        (tf.constant(0), *variables),
        maximum_iterations=steps,
    )[1:]


def _array(like: Any, size: Any) -> Any:
    """Room for tensors like this one. In eager code an array forgets what was read; the way back reads it again."""
    return tf.TensorArray(like.dtype, size, element_shape=like.shape, clear_after_read=False)


def _unstacked(values: Any) -> Any:
    array = tf.TensorArray(
        values.dtype, keras.ops.shape(values)[0], element_shape=values.shape[1:], clear_after_read=False
    )
    return array.unstack(values)


def _recurrence(
    cell: Any,
    x: Any,
    mask: Any,
    kernel: Any,
    bias: Any,
    states: Sequence[Any],
    unroll: bool,
    return_sequences: bool,
) -> tuple[Any, list[Any]]:
    """Runs a cell over the products of the inputs, with a gradient that runs back over what this keeps.

    Each step keeps its sums and its output in the dtype of `x`, and the other states as they are. Running back, it
    stacks the gradients to the products; the gradient to the kernel is one product of the stacks, that to the bias a
    float32 sum. What TensorFlow derives from a loop keeps the result of each operation, and rounds a product for the
    kernel's gradient in every step.

    Args:
        cell: has `sums`, `to_products` and `gates`.
        x: tensor of shape (steps, batch, parts * units), products with the inputs.
        mask: bool tensor of shape (steps, batch, 1), or None.
        kernel: float32 tensor of shape (units, parts * units).
        bias: float32 tensor of the size of `sums`, or None.
        states: float32 tensors of shape (batch, units).
        unroll: whether the loop is written out.
        return_sequences: whether all outputs are needed.

    Returns:
        Tensor of shape (steps, batch, units) in the dtype of `x`, or None, and the last states.
    """
    steps, batch, _ = keras.ops.shape(x)
    units = kernel.shape[0]
    count = len(states)

    def cell_step(sums: Any, bias: Sequence[Any], states: Sequence[Any], there: Any) -> list[Any]:
        new = cell.gates(sums + bias[0] if bias else sums, *states)
        return [state if there is None else tf.where(there, state, old) for state, old in zip(new, states, strict=True)]

    @fusion.custom_gradient
    def run(x: Any, kernel: Any, *others: Any) -> Any:
        states, bias = others[:count], others[count:]
        dtype = states[0].dtype
        rounded = tf.cast(kernel, x.dtype)
        inputs, masks = _unstacked(x), () if mask is None else (_unstacked(mask),)

        def body(step: Any, sums_kept: Any, outputs: Any, others_kept: Any, *states: Any) -> Any:
            # The state that the kernel multiplies is what the outputs hold of it.
            r = tf.matmul(tf.cast(states[0], x.dtype), rounded)
            sums = cell.sums(tf.cast(inputs.read(step), dtype), tf.cast(r, dtype))
            new = cell_step(sums, bias, states, masks[0].read(step) if masks else None)
            for state, old in zip(new, states, strict=True):
                state.set_shape(old.shape)
            return (
                sums_kept.write(step, tf.cast(sums, x.dtype)),
                outputs.write(step + 1, tf.cast(new[0], x.dtype)),
                [kept.write(step, state) for kept, state in zip(others_kept, states[1:], strict=True)],
                *new,
            )

        sums_like = cell.sums(x[0], x[0])
        output_like = tf.cast(states[0], x.dtype)
        outputs = _array(output_like, steps + 1).write(0, output_like)
        sums_kept, outputs, others_kept, *last = _loop(
            steps,
            body,
            (_array(sums_like, steps), outputs, [_array(state, steps) for state in states[1:]], *states),
            unroll,
        )
        outputs = outputs.stack()
        before = outputs[:-1]
        # Tensors, as an array can neither be saved with the gradient of an exported model, nor go from eager code into
        # the graph in which TensorFlow computes a Jacobian.
        all_sums, *all_before = sums_kept.stack(), before, *(each.stack() for each in others_kept)

        def gradient(*upstream: Any) -> Any:
            to_outputs = (_unstacked(upstream[0]),) if return_sequences else ()
            sums_kept, befores = _unstacked(all_sums), [_unstacked(each) for each in all_before]
            masks = () if mask is None else (_unstacked(mask),)

            def back(number: Any, to_x: Any, to_r: Any, to_bias: Any, *to_states: Any) -> Any:
                step = steps - 1 - number
                sums = tf.cast(sums_kept.read(step), dtype)
                states = [tf.cast(each.read(step), dtype) for each in befores]
                with tf.GradientTape() as tape:
                    tape.watch([sums, *states])
                    new = cell_step(sums, bias, states, masks[0].read(step) if masks else None)
                to_h = to_states[0]
                for each in to_outputs:
                    to_h += tf.cast(each.read(step), dtype)
                to_sums, *to_before = tape.gradient(
                    new, [sums, *states], [to_h, *to_states[1:]], unconnected_gradients="none"
                )
                to_product_x, to_product_r = (tf.cast(each, x.dtype) for each in cell.to_products(to_sums))
                through_kernel = tf.cast(tf.matmul(to_product_r, rounded, transpose_b=True), dtype)
                to_before[0] = through_kernel if to_before[0] is None else to_before[0] + through_kernel
                for new_gradient, old in zip(to_before, to_states, strict=True):
                    new_gradient.set_shape(old.shape)
                return (
                    to_x.write(step, to_product_x),
                    [each.write(step, to_product_r) for each in to_r],
                    [each + to_sums for each in to_bias],
                    *to_before,
                )

            # Where both are one, as in an LSTM, one array will do.
            shared = cell.to_products(sums_like)[0] is cell.to_products(sums_like)[1]
            to_x, to_r, to_bias, *to_states = _loop(
                steps,
                back,
                (
                    _array(x[0], steps),
                    [] if shared else [_array(x[0], steps)],
                    [tf.zeros([batch, sums_like.shape[1]], dtype) for _ in bias],
                    *upstream[len(to_outputs) :],
                ),
                unroll,
            )
            to_x = to_x.stack()
            to_r = to_x if shared else to_r[0].stack()
            to_kernel = tf.matmul(
                tf.reshape(before, [-1, units]), tf.reshape(to_r, [-1, kernel.shape[1]]), transpose_a=True
            )
            return (
                to_x,
                tf.cast(to_kernel, kernel.dtype),
                *to_states,
                *(tf.reduce_sum(each, 0) for each in to_bias),
            )

        return ([outputs[1:]] if return_sequences else []) + list(last), gradient

    answers = list(run(x, kernel, *states, *([] if bias is None else [bias])))
    return (answers[0], answers[1:]) if return_sequences else (None, answers)
