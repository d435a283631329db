"""Dense layers over one axis and over several."""

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.core.quantizing import Quantizing
from keras_mp.ops import dense

__all__ = ["Dense", "EinsumDense"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Dense(Quantizing, keras.layers.Dense):
    """A dense layer whose gradient to the bias is summed in float32.

    A drop-in for `keras.layers.Dense`, with the same arguments and weights. For a model's output see `Head`.

    Args:
        units: int, size of the last axis of the output.
        activation: function or its name, or None. Defaults to None.
        use_bias: bool, whether there is a bias. Defaults to True.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor of shape (batch, ..., units) in the compute dtype.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.Dense(1, dtype="mixed_bfloat16")
        >>> with tf.GradientTape() as tape:
        ...     y = layer(tf.ones((4096, 8)))
        >>> tape.gradient(y, layer.bias.value).numpy().tolist()
        [4096.0]
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes activation(inputs @ kernel + bias); see the class."""
        where = execution.current()
        if not where.training:
            return super().call(inputs, training=training)
        kernel = tf.convert_to_tensor(self.kernel)
        if not dense.takes(inputs, kernel, where):
            return super().call(inputs, training=training)
        outputs = dense.affine(inputs, kernel, self.bias, inputs.shape.rank - 1, where)
        return outputs if self.activation is None else self.activation(outputs)


@keras.saving.register_keras_serializable(package="keras_mp")
class EinsumDense(Quantizing, keras.layers.EinsumDense):
    """A dense layer over several axes that multiplies two matrices and sums the gradient to the bias in float32.

    A drop-in for `keras.layers.EinsumDense`, with the same arguments and weights. It multiplies two matrices where the
    kernel's first axes are the last axes of the inputs, as in "abc,cde->abde" and "...x,xy->...y". For an ellipsis in
    half precision TensorFlow's einsum returns wrong numbers on a CPU; this layer never gives it one.

    Args:
        equation: str of two operands, as for `keras.ops.einsum`.
        output_shape: int or tuple of ints, without the batch. None stands for a size of the inputs.
        activation: function or its name, or None. Defaults to None.
        bias_axes: str, axes of the output that the bias has. Defaults to None: no bias.
        **kwargs: other arguments of Keras's layer.

    Returns:
        Tensor as the equation says, in the compute dtype.

    Example:
        >>> import keras_mp
        >>> layer = keras_mp.layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 4), bias_axes="de")
        >>> layer(tf.ones((1, 3, 8))).shape
        TensorShape([1, 3, 2, 4])
    """

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes activation(einsum(equation, inputs, kernel) + bias); see the class."""
        del training
        kernel = tf.convert_to_tensor(self.kernel)
        outputs = dense.einsum(self.equation, inputs, kernel, self.bias, execution.current())
        return outputs if self.activation is None else self.activation(outputs)
