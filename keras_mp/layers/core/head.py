"""The output layer of a model: a dense layer that multiplies 16-bit numbers and returns float32."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_files, keras_variables
from keras_mp.layers.core.quantizing import Quantizing
from keras_mp.ops import matmul

__all__ = ["Head"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Head(Quantizing, keras.layers.Dense):
    """A dense layer for the output of a model, which returns float32 under every dtype policy.

    A drop-in for `keras.layers.Dense`, with the same arguments and weights. Its weights have the same place in files,
    so a model with a `Head` loads the weights file of one with a `Dense`, and the reverse.

    Under a mixed policy, kernel and inputs are rounded to half precision as in `Dense`. The sums of their products are
    float32 and not rounded. So logits above 65504 stay finite in float16, and classes that bfloat16 cannot tell apart
    do not tie. Bias and activation, such as softmax, are computed in float32. The backward pass multiplies 16-bit
    numbers and keeps no float32 copy of the inputs.

    Args:
        units: int, size of the last axis of the output.
        activation: function or its name, or None. Defaults to None.
        use_bias: bool, whether there is a bias. Defaults to True.
        **kwargs: other arguments of Keras's layer.

    Returns:
        float32 tensor of shape (batch, ..., units).

    Raises:
        ValueError: if `units` is not a positive int.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> head = keras_mp.layers.Head(2, kernel_initializer="ones", dtype="mixed_float16")
        >>> head(np.array([[60000.0, 60000.0]], "float16"))
        <tf.Tensor: shape=(1, 2), dtype=float32, numpy=array([[120000., 120000.]], dtype=float32)>

    Float32 sums of 16-bit products: Micikevicius et al., "Mixed Precision Training", 2017,
    https://arxiv.org/abs/1710.03740, section 3.3.
    """

    def __init__(self, units: int, activation: Any = None, use_bias: bool = True, **kwargs: Any) -> None:
        super().__init__(units, activation=activation, use_bias=use_bias, **kwargs)
        self.autocast = False  # float32 inputs are rounded once, by the matmul

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Creates a weight that Keras does not round when it is read. The layer's `autocast` does not prevent that."""
        return super().add_weight(*args, **{**kwargs, "autocast": False})

    def call(self, inputs: "tf.Tensor | tf.SparseTensor", training: bool | None = None) -> tf.Tensor:
        """Computes activation(inputs @ kernel + bias); see the class."""
        del training
        kernel = tf.convert_to_tensor(self.kernel)
        if isinstance(inputs, tf.SparseTensor) or self.compute_dtype not in ("float16", "bfloat16"):
            inputs = keras.ops.cast(inputs, self.compute_dtype)
            x = keras.ops.matmul(inputs, keras.ops.cast(kernel, self.compute_dtype))
        else:
            x = matmul.logits(tf.cast(inputs, self.compute_dtype), kernel, execution.current())
        if self.bias is not None:
            x = keras.ops.add(x, self.bias)
        x = keras.ops.cast(x, "float32")
        return x if self.activation is None else self.activation(x)

    def compute_output_spec(self, inputs: keras.KerasTensor, training: bool | None = None) -> keras.KerasTensor:
        """Returns the symbolic output. Keras would give it the compute dtype."""
        del training
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype="float32")

    def quantized_call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Computes the same with a quantized kernel. Keras multiplies, and the activation is computed in float32."""
        activation = getattr(self, "activation", None)
        self.activation = None
        try:
            if self.quantization_mode == "float8":  # Keras takes inputs and kernel in the compute dtype for it
                with keras_variables.reading_in(self.compute_dtype, self._kernel):
                    x = super().quantized_call(keras.ops.cast(inputs, self.compute_dtype), training=training)
            else:
                x = super().quantized_call(inputs, training=training)
        finally:
            self.activation = activation
        x = keras.ops.cast(x, "float32")
        return x if activation is None else activation(x)


keras_files.store_like(Head, keras.layers.Dense)
