"""The base of every convolution here: when to run its own ops, and its bias."""

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import empty_batches
from keras_mp.ops.dense import add_bias

__all__ = ["Convolving"]


class Convolving(keras.layers.Layer):
    """A convolution with its own training step. Keras's layer comes after this class among the bases.

    The gradient to the bias is summed in float32. Outside training the graph is the one of Keras's layer, so an
    exported model holds nothing else. The same goes for channels first, which TensorFlow computes on GPUs only.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Computes activation(convolution + bias); see the class."""
        where = execution.current()
        if not self.is_ours(inputs, where):
            return super().call(inputs)
        outputs = empty_batches.of_some(
            lambda rows: self.convolve(rows, where), inputs, served=not where.training, where=where
        )
        if self.bias is not None:
            bias = tf.convert_to_tensor(self.bias)
            # A subclass's `convolution_op` may return another dtype. Keras promotes then.
            alike = outputs.dtype == bias.dtype
            outputs = add_bias(outputs, bias, where) if alike else keras.ops.add(outputs, bias)
        return outputs if self.activation is None else self.activation(outputs)

    def is_ours(self, inputs: tf.Tensor, where: execution.Execution) -> bool:
        """Whether to run `convolve`: channels last, in a training step or in one replica of several.

        Args:
            inputs: argument of the layer.
            where: where the layer's call is executed.
        """
        return self.data_format == "channels_last" and (where.training or where.replicas > 1)

    def convolve(self, inputs: tf.Tensor, where: execution.Execution) -> tf.Tensor:
        """Returns the convolution, channels last, without bias and activation.

        Args:
            inputs: tensor in the compute dtype.
            where: where the layer's call is executed.
        """
        raise NotImplementedError
