"""Convolutional LSTMs whose states are float32, whatever the dtype of the convolutions."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_variables
from keras_mp.layers.recurrent.cells import Cell
from keras_mp.layers.recurrent.layers import WideStates
from keras_mp.ops import fusion, matmul
from keras_mp.ops.recurrence import masked

__all__ = ["ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "ConvLSTMCell"]


class ConvLSTMCell(Cell, keras_layers.ConvLSTMCell):
    """One step: convolutions in the compute dtype, sums, gates and states in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False

    def get_initial_state(self: Any, batch_size: Any = None) -> list[Any]:
        """Zeros, in float32 or float64."""
        wide = self.wide_dtype
        return [tf.cast(state, wide) for state in keras_layers.ConvLSTMCell.get_initial_state(self, batch_size)]

    def call(self: Any, inputs: Any, states: Any, training: Any = False) -> tuple[Any, Any]:
        """Makes one step."""
        h, c = states
        dtype, wide = self.compute_dtype, self.wide_dtype
        of_inputs = self.get_dropout_mask(inputs) if training and 0 < self.dropout < 1 else None
        of_state = self.get_recurrent_dropout_mask(h) if training and 0 < self.recurrent_dropout < 1 else None
        kernels = [tf.cast(keras_variables.uncast(kernel), dtype) for kernel in (self.kernel, self.recurrent_kernel)]
        x = self._convolved(
            lambda x, kernel: self.input_conv(x, kernel, padding=self.padding), inputs, kernels[0], of_inputs
        )
        r = self._convolved(self.recurrent_conv, h, kernels[1], of_state)
        bias = (keras_variables.uncast(self.bias),) if self.use_bias else ()
        h, c = self._gates(x, r, tf.cast(c, wide), *bias)
        return tf.cast(h, dtype), [h, c]

    def _convolved(self: Any, convolve: Any, x: Any, kernel: Any, masks: Any) -> Any:
        """The sums of all four gates; with a mask for each, each of what the mask leaves."""
        if masks is None:
            return matmul.product(convolve, tf.cast(x, kernel.dtype), kernel)
        parts = zip(masks, tf.split(kernel, 4, -1), strict=True)
        channels = 1 if self.data_format == "channels_first" else -1
        return tf.concat(
            [matmul.product(convolve, masked(x, mask, kernel.dtype), part) for mask, part in parts], channels
        )

    def _gates(self: Any, x: Any, r: Any, c: Any, *bias: Any) -> tuple[Any, Any]:
        """The new output and cell state. The backward pass computes the gates again, of the 16-bit sums."""
        channels = 1 if self.data_format == "channels_first" else self.rank + 1

        def compute(x: Any, r: Any, c: Any, *bias: Any) -> list[Any]:
            sums = tf.cast(x, c.dtype) + tf.cast(r, c.dtype)
            for each in bias:
                sums += tf.reshape(
                    tf.cast(each, c.dtype), [-1 if axis == channels else 1 for axis in range(self.rank + 2)]
                )
            i, f, g, o = tf.split(sums, 4, channels)
            c = self.recurrent_activation(f) * c + self.recurrent_activation(i) * self.activation(g)
            return [self.recurrent_activation(o) * self.activation(c), c]

        @fusion.custom_gradient
        def run(*tensors: Any) -> Any:
            def gradient(*upstream: Any) -> Any:
                there = [fusion.not_before(upstream[0], tensor) for tensor in tensors]
                with tf.GradientTape() as tape:
                    tape.watch(there)
                    new = compute(*there)
                return tape.gradient(new, there, upstream)

            return compute(*tensors), gradient

        h, c = run(x, r, c, *bias)
        return h, c


class _ConvLSTM(WideStates):
    """What the layers share: the cell that the constructor of Keras's layer has made becomes ours."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self.cell, "__class__", ConvLSTMCell)  # as for `LSTM`
        self.cell.autocast = False


@keras.saving.register_keras_serializable(package="keras_mp")
class ConvLSTM1D(_ConvLSTM, keras.layers.ConvLSTM1D):
    """Convolutional LSTM over sequences of sequences, with float32 states.

    A drop-in for `keras.layers.ConvLSTM1D`, with the same arguments and weights. The convolutions have the compute
    dtype, their sum, the gates and the states are float32, as in `LSTM`.

    Args:
        filters: int, number of channels of the output and of the states.
        kernel_size: int, or a tuple of one.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        sequences: tensor of shape (batch, steps, length, channels).
        initial_state, mask, training: as for `LSTM`.

    Returns:
        The last output, of shape (batch, length, filters), or all with `return_sequences`, in the compute dtype; with
        `return_state`, followed by both states, in float32.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.ConvLSTM1D(4, 3, return_state=True, dtype="mixed_bfloat16")
        >>> y, h, c = layer(tf.ones((2, 100, 8, 3)))
        >>> y.shape, y.dtype, c.dtype
        (TensorShape([2, 6, 4]), tf.bfloat16, tf.float32)

    Shi et al., "Convolutional LSTM Network", 2015, https://arxiv.org/abs/1506.04214.
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class ConvLSTM2D(_ConvLSTM, keras.layers.ConvLSTM2D):
    """Convolutional LSTM over sequences of images, with float32 states.

    A drop-in for `keras.layers.ConvLSTM2D`, with the same arguments and weights; see `ConvLSTM1D`.

    Args:
        filters: int, number of channels of the output and of the states.
        kernel_size: int, or a tuple of two.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        sequences: tensor of shape (batch, steps, height, width, channels).

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.ConvLSTM2D(4, 3, padding="same", dtype="mixed_bfloat16")
        >>> layer(tf.ones((2, 5, 8, 8, 3))).shape
        TensorShape([2, 8, 8, 4])
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class ConvLSTM3D(_ConvLSTM, keras.layers.ConvLSTM3D):
    """Convolutional LSTM over sequences of volumes, with float32 states.

    A drop-in for `keras.layers.ConvLSTM3D`, with the same arguments and weights; see `ConvLSTM1D`.

    Args:
        filters: int, number of channels of the output and of the states.
        kernel_size: int, or a tuple of three.
        *args, **kwargs: as in Keras, in the same order.

    Call arguments:
        sequences: tensor of shape (batch, steps, depth, height, width, channels).

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.ConvLSTM3D(4, 3, padding="same", dtype="mixed_bfloat16")
        >>> layer(tf.ones((2, 2, 4, 4, 4, 3))).shape
        TensorShape([2, 4, 4, 4, 4])
    """
