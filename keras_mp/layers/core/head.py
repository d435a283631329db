"""The output layer of a model: a dense layer that multiplies 16-bit numbers and answers in float32."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_files, keras_variables
from keras_mp.layers.core.quantizing import Quantizing
from keras_mp.ops import fusion
from keras_mp.ops.matmul import are_wide

__all__ = ["Head", "matmul"]


@keras.saving.register_keras_serializable(package="keras_mp")
class Head(Quantizing, keras.layers.Dense):
    """A dense layer for the output of a model, that answers in float32 whatever the dtype policy is.

    A drop-in for `keras.layers.Dense`, with the same arguments and weights, which stand in files where those of a
    `Dense` would: the weights files of a model with either fit the other. Under a mixed
    policy the kernel and the inputs are rounded to 16 bits, as in `Dense`; their products are summed in float32 and the
    sum is not rounded. So logits above 65504 stay finite in float16, and classes that bfloat16 cannot tell apart do not
    tie. Bias and activation, a softmax for one, are computed in float32. The backward pass multiplies 16-bit numbers
    and keeps no float32 copy of the inputs.

    Args:
        units: int, the size of the last axis of the output.
        activation: function or name of one, or None. Defaults to None.
        use_bias: bool, whether there is a bias. Defaults to True.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer, activity_regularizer,
            kernel_constraint, bias_constraint, lora_rank, lora_alpha: as in Keras.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, ..., features); float16, bfloat16, float32, float64 or integers.

    Returns:
        float32 tensor of shape (batch, ..., units).

    Raises:
        ValueError: if `units` is not a positive int, or the rank or the last axis of `inputs` is not as built.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> head = keras_mp.layers.Head(2, kernel_initializer="ones", dtype="mixed_float16")
        >>> head(np.array([[60000.0, 60000.0]], "float16"))
        <tf.Tensor: shape=(1, 2), dtype=float32, numpy=array([[120000., 120000.]], dtype=float32)>

    Sums in float32 of 16-bit products: Micikevicius et al., "Mixed Precision Training", 2017,
    https://arxiv.org/abs/1710.03740, section 3.3.
    """

    def __init__(self, units: int, activation: Any = None, use_bias: bool = True, **kwargs: Any) -> None:
        if not isinstance(units, int) or isinstance(units, bool) or units <= 0:  # Keras 3.12 does not ask
            raise ValueError(
                f"Received an invalid value for `units`, expected a positive integer. Received: units={units}"
            )
        super().__init__(units, activation=activation, use_bias=use_bias, **kwargs)
        self.autocast = False  # float32 inputs are rounded once, by the product

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """Creates a weight that is read as it is stored: `autocast` of the layer does not keep Keras from rounding."""
        return super().add_weight(*args, **{**kwargs, "autocast": False})

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Computes activation(inputs @ kernel + bias); see the class."""
        del training
        kernel = tf.convert_to_tensor(self.kernel)
        if isinstance(inputs, tf.SparseTensor) or self.compute_dtype not in ("float16", "bfloat16"):
            inputs = keras.ops.cast(inputs, self.compute_dtype)
            x = keras.ops.matmul(inputs, keras.ops.cast(kernel, self.compute_dtype))
        else:
            x = _product(tf.cast(inputs, self.compute_dtype), kernel)
        if self.bias is not None:
            x = keras.ops.add(x, self.bias)
        x = keras.ops.cast(x, "float32")
        return x if self.activation is None else self.activation(x)

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> Any:
        """The output as a symbolic tensor, of which Keras would say that it has the compute dtype."""
        del training
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype="float32")

    def quantized_call(self, inputs: Any, training: Any = None) -> Any:
        """Computes the same with a quantized kernel. Keras multiplies, and the activation is computed in float32."""
        activation = getattr(self, "activation", None)
        self.activation = None
        try:
            if self.quantization_mode == "float8":  # of which Keras takes inputs and kernel in the compute dtype
                with keras_variables.reading_in(self.compute_dtype, self._kernel):
                    x = super().quantized_call(keras.ops.cast(inputs, self.compute_dtype), training=training)
            else:
                x = super().quantized_call(inputs, training=training)
        finally:
            self.activation = activation
        x = keras.ops.cast(x, "float32")
        return x if activation is None else activation(x)


keras_files.store_like(Head, keras.layers.Dense)


def matmul(a: Any, b: Any, transpose_a: bool, transpose_b: bool, output_dtype: tf.DType, wide: bool) -> Any:
    """Product of two matrices of one 16-bit dtype, summed in float32, with gradients of any order.

    TensorFlow's 16-bit product rounds its sums to 16 bits, except by XLA. Outside XLA a float32 result is that of a
    float32 product, exact in the products of 16-bit numbers (as NVIDIA's TF32 is), and half as fast as a 16-bit one.
    Where that is not so, on some CPUs, all are `wide`.

    Args:
        a: matrix.
        b: matrix of the same dtype.
        transpose_a: bool.
        transpose_b: bool.
        output_dtype: of the product, float32 or that of the matrices.
        wide: whether to compute in float32, whatever the dtype.
    """

    @fusion.custom_gradient
    def product(a: Any, b: Any) -> Any:
        def gradient(upstream: Any) -> tuple[Any, Any]:
            g = tf.cast(upstream, a.dtype)
            to_a = (b, g, transpose_b, True) if transpose_a else (g, b, False, not transpose_b)
            to_b = (g, a, True, transpose_a) if transpose_b else (a, g, not transpose_a, False)
            return matmul(*to_a, a.dtype, wide), matmul(*to_b, b.dtype, wide)

        if output_dtype == a.dtype and not wide:
            return tf.matmul(a, b, transpose_a=transpose_a, transpose_b=transpose_b), gradient
        if execution.in_xla_context():
            y = tf.raw_ops.BatchMatMulV3(x=a, y=b, Tout=output_dtype, adj_x=transpose_a, adj_y=transpose_b)
        else:
            wide_a, wide_b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
            y = tf.cast(tf.matmul(wide_a, wide_b, transpose_a=transpose_a, transpose_b=transpose_b), output_dtype)
        return y, gradient

    return product(a, b)


def _product(x: Any, kernel: Any) -> Any:
    """The product in float32 of 16-bit `x`, of any rank, and a kernel that is rounded to the dtype of `x`."""
    wide = execution.recording() and are_wide(x.dtype)  # else there is no gradient that would differ

    @fusion.custom_gradient
    def product(x: Any, kernel: Any) -> Any:
        def gradient(upstream: Any) -> tuple[Any, Any]:
            g = tf.cast(upstream, x.dtype)
            to_x = matmul(g, tf.cast(kernel, x.dtype), False, True, x.dtype, wide)
            # XLA's product does not round the sums over the batch; TensorFlow's is the one that `Dense` has.
            to_kernel = matmul(x, g, True, False, tf.float32 if execution.in_xla_context() else x.dtype, wide)
            return to_x, tf.cast(to_kernel, kernel.dtype)

        return matmul(x, tf.cast(kernel, x.dtype), False, False, tf.float32, wide), gradient

    if len(x.shape) == 2:
        return product(x, kernel)
    y = product(tf.reshape(x, [-1, kernel.shape[0]]), kernel)
    y = tf.reshape(y, tf.concat([tf.shape(x)[:-1], [kernel.shape[1]]], 0))
    return fusion.shaped(y, [*x.shape[:-1], kernel.shape[1]])
