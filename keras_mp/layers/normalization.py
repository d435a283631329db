"""Layer and batch normalization with float32 statistics and 16-bit tensors."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp import backend

__all__ = ["BatchNormalization", "LayerNormalization"]

# cuDNN refuses a smaller epsilon, and `tf.compat.v1.nn.fused_batch_norm` silently raises one to this.
_FUSED_EPSILON_MIN = 1.001e-5


@keras.saving.register_keras_serializable(package="keras_mp")
class LayerNormalization(keras.layers.LayerNormalization):
    """Layer normalization that computes in float32 and keeps only its 16-bit input for the backward pass.

    A drop-in for `keras.layers.LayerNormalization`, with the same arguments and weights. The mean is subtracted before
    anything is scaled or squared, so large inputs that differ little keep their digits.

    Args:
        axis: int, or list or tuple of ints, the axes to normalize over. Defaults to -1.
        epsilon: float, added to the variance, in the squared unit of the input. Defaults to 1e-3.
        center, scale: bool, whether there is an offset `beta`, a factor `gamma`. Default to True.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint:
            as in Keras, for these weights.
        **kwargs: `rms_scaling` (deprecated by Keras), `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape whose `axis` is static; float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: if `axis` is neither an int nor a list or tuple.
        ValueError: if an axis is out of bounds.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.LayerNormalization(dtype="mixed_float16")
        >>> y = layer(np.array([[59968.0, 60000.0]], "float16"))
        >>> y.numpy().tolist(), y.dtype
        ([[-1.0, 1.0]], tf.float16)

    Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450. With n the normalized input and
    h = g * gamma, the gradient to the input is (h - mean(h) - n * mean(h * n)) / sqrt(variance + epsilon): Ioffe and
    Szegedy, 2015, section 3, with the sums over `axis`.
    """

    def build(self, input_shape: Any) -> None:
        """Creates `gamma` and `beta`."""
        self.compute_output_shape(input_shape)  # Keras's words for an axis that is out of bounds
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        """Normalizes `inputs`; see the class."""
        dtype = keras.backend.result_type(inputs.dtype, self.compute_dtype, "float32")
        if self.rms_scaling:
            return super().call(tf.cast(inputs, dtype))
        rank = len(inputs.shape)
        axes = [axis % rank for axis in self.axis]
        # Keras reshapes the weights in this way, also where `axis` is not in the order of the input.
        shape = [inputs.shape[axis] if axis in axes else 1 for axis in range(rank)]
        weights = {
            name: tf.reshape(keras.ops.cast(weight, dtype), shape)
            for name, weight in (("gamma", self.gamma), ("beta", self.beta))
            if weight is not None
        }
        return _layer_normalization(inputs, weights, axes, self.epsilon, dtype, self.compute_dtype)


def _layer_normalization(
    x: Any, weights: dict[str, Any], axes: list[int], epsilon: float, dtype: str, output_dtype: str
) -> Any:
    other_axes = [axis for axis in range(len(x.shape)) if axis not in axes]

    def normalized(x: Any) -> tuple[Any, Any]:
        x = tf.cast(x, dtype)
        centred = x - tf.reduce_mean(x, axes, keepdims=True)
        inverse = tf.math.rsqrt(tf.reduce_mean(tf.square(centred), axes, keepdims=True) + epsilon)
        return centred * inverse, inverse

    @tf.custom_gradient
    def layer_normalization(x: Any, *values: Any) -> Any:
        given = dict(zip(weights, values, strict=True))

        def gradient(upstream: Any) -> Any:
            n, inverse = normalized(x)
            g = tf.cast(upstream, dtype)
            h = g * given["gamma"] if "gamma" in given else g
            to_x = inverse * (
                h - tf.reduce_mean(h, axes, keepdims=True) - n * tf.reduce_mean(h * n, axes, keepdims=True)
            )
            of_weight = {"gamma": g * n, "beta": g}
            return [
                tf.cast(to_x, x.dtype),
                *(tf.reduce_sum(of_weight[name], other_axes, keepdims=True) for name in given),
            ]

        y, _ = normalized(x)
        if "gamma" in given:
            y *= given["gamma"]
        if "beta" in given:
            y += given["beta"]
        return tf.cast(y, output_dtype), gradient

    return layer_normalization(x if x.dtype.is_floating else tf.cast(x, dtype), *weights.values())


@keras.saving.register_keras_serializable(package="keras_mp")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization with float32 statistics that reads and writes 16-bit tensors, in one fused operation.

    A drop-in for `keras.layers.BatchNormalization`, with the same arguments, weights and moving statistics. With the
    channels last, `epsilon` at least 1.001e-5, and no XLA, it is TensorFlow's fused kernel; with a mask, `renorm` or
    `synchronized`, in training, it is Keras's computation in float32; elsewhere the same formula written out. But for
    those three, an empty batch, as the last one of an epoch can be on a replica, leaves the moving statistics alone,
    and so does a batch whose statistics are not finite, as that of a step which the optimizer skips.

    Args:
        axis: int, the axis of the channels, which are not normalized over. Defaults to -1.
        momentum: float, the share of the moving statistics that each batch keeps. Defaults to 0.99.
        epsilon: float, added to the variance, in the squared unit of the input. Defaults to 1e-3.
        center, scale: bool, whether there is an offset `beta`, a factor `gamma`. Default to True.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer, beta_regularizer,
            gamma_regularizer, beta_constraint, gamma_constraint: as in Keras, for these weights.
        renorm, renorm_clipping, renorm_momentum: batch renormalization, as in Keras.
        synchronized: bool, whether the statistics are those of all the replicas' batches. Defaults to False.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape whose `axis` is static; float16, bfloat16, float32, float64 or integers.
        training: bool, whether to normalize by the batch's statistics (and move the moving ones) or by the moving ones.
            `trainable = False` means the latter, as in Keras.
        mask: bool, of the shape of `inputs` without its last axis, True where an element counts. Defaults to None.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        ValueError: if `axis` is out of bounds, or the mask's rank is not one less than that of `inputs`.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.BatchNormalization(dtype="mixed_float16")
        >>> y = layer(np.array([[99999.0], [100001.0]], "float32"), training=True)  # float16 ends at 65504
        >>> y.numpy().tolist(), y.dtype
        ([[-0.99951171875], [0.99951171875]], tf.float16)

    Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def build(self, input_shape: Any) -> None:
        """Creates `gamma`, `beta` and the moving statistics."""
        self.compute_output_shape(input_shape)  # Keras's words for an axis that is out of bounds
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalizes `inputs`; see the class."""
        x = inputs
        if keras.backend.standardize_dtype(x.dtype) != self.compute_dtype:
            # A 16-bit input stays one only where the answer has the same dtype: the fused kernel answers in it.
            x = tf.cast(x, keras.backend.result_type(x.dtype, self.compute_dtype, "float32"))
        by_batch = bool(training) and self.trainable
        renorm = getattr(self, "renorm", False)  # Keras 3.12, the last for Python 3.10, has none
        if mask is not None or (by_batch and (renorm or self.synchronized)):
            return super().call(x, training=training, mask=mask)

        fused = (
            self.axis % len(x.shape) == len(x.shape) - 1
            and self.epsilon >= _FUSED_EPSILON_MIN
            and x.dtype != tf.float64
            # XLA fuses the written-out formula just as well, and expands the fused op into E[x^2] - E[x]^2, which for
            # a mean of 10000 and a variance of 1 gave a variance of 48.
            and not backend.in_xla_context()
        )
        if not (fused or by_batch):
            return super().call(x, training=False)
        outputs, mean, variance = self._fused(x, by_batch) if fused else self._written_out(x)
        if by_batch:
            self._move(mean, variance, x)
        return tf.cast(outputs, self.compute_dtype)

    def _fused(self, x: Any, by_batch: bool) -> tuple[Any, Any, Any]:
        """The normalized input with the statistics it was normalized by, from one kernel."""
        channels = x.shape[-1]
        # The kernel takes rank 4. The elements stand in its second axis, as cuDNN limits the size of the first.
        images = x if len(x.shape) == 4 else tf.reshape(x, [1, -1, 1, channels])
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=images,
            scale=keras.ops.cast(self.gamma, "float32") if self.scale else tf.ones([channels]),
            offset=keras.ops.cast(self.beta, "float32") if self.center else tf.zeros([channels]),
            mean=tf.zeros([0]) if by_batch else keras.ops.cast(self.moving_mean, "float32"),
            variance=tf.zeros([0]) if by_batch else keras.ops.cast(self.moving_variance, "float32"),
            epsilon=self.epsilon,
            is_training=by_batch,
        )
        if len(x.shape) != 4:
            outputs = tf.ensure_shape(tf.reshape(outputs, tf.shape(x)), x.shape)
        # The kernel divides by n - 1 (by 1 where n is 1) for the variance it answers; Keras moves by that of n.
        n = tf.cast(tf.size(x, tf.int64) // channels, tf.float32)
        return outputs, mean, variance * ((n - 1.0) / n)

    def _written_out(self, x: Any) -> tuple[Any, Any, Any]:
        """The same in training, in ops that any device and compiler takes."""
        x = tf.cast(x, keras.backend.result_type(x.dtype, "float32"))
        axis = self.axis % len(x.shape)
        mean, variance = tf.nn.moments(x, [a for a in range(len(x.shape)) if a != axis])
        # The NaN of an empty batch would reach the gradient of gamma.
        mean, variance = (tf.where(tf.size(x) > 0, statistic, 0.0) for statistic in (mean, variance))
        shape = [x.shape[axis] if a == axis else 1 for a in range(len(x.shape))]
        scale = tf.math.rsqrt(variance + self.epsilon)
        if self.scale:
            scale *= keras.ops.cast(self.gamma, x.dtype)
        # Centred before it is scaled: x * scale - mean * scale cancels digits where the mean is large.
        outputs = (x - tf.reshape(mean, shape)) * tf.reshape(scale, shape)
        if self.center:
            outputs += tf.reshape(keras.ops.cast(self.beta, x.dtype), shape)
        return outputs, mean, variance

    def _move(self, mean: Any, variance: Any, x: Any) -> None:
        """Moves the moving statistics towards the batch's, in the channels where those are finite.

        An empty batch has none, and one with NaN or an overflow is one that the optimizer skips: once in the moving
        statistics, NaN would stay for ever.
        """
        finite = tf.math.is_finite(mean) & tf.math.is_finite(variance) & (tf.size(x) > 0)
        for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = keras.ops.cast(moving, statistic.dtype)
            new = old * self.momentum + statistic * (1.0 - self.momentum)
            moving.assign(tf.where(finite, new, old))
