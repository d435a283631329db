"""Batch normalization with float32 statistics and 16-bit tensors."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.layers.normalization.normalization import normalize_with_statistics
from keras_mp.ops import fusion

__all__ = ["BatchNormalization"]

# cuDNN refuses a smaller epsilon, and `tf.compat.v1.nn.fused_batch_norm` silently raises one to this.
_FUSED_EPSILON_MIN = 1.001e-5


@keras.saving.register_keras_serializable(package="keras_mp")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization with float32 statistics that reads and writes 16-bit tensors, in one fused operation.

    A drop-in for `keras.layers.BatchNormalization`, with the same arguments, weights and moving statistics. With the
    channels last, `epsilon` at least 1.001e-5, and no XLA, it is TensorFlow's fused kernel; with a mask or
    `synchronized`, in training, with channels that the kernel is slow at, and elsewhere, the same formula written out.
    The variance is always that of what is left when the mean is subtracted. An empty batch, as the last one of an epoch
    can be on a replica, leaves the moving statistics alone, and so does a batch whose statistics are not finite, as
    that of a step which the optimizer skips; `renorm` is Keras's computation, without that care.

    Args:
        axis: int, the axis of the channels, which are not normalized over. Defaults to -1.
        momentum: float, the share of the moving statistics that each batch keeps. Defaults to 0.99.
        epsilon: float, added to the variance, in the squared unit of the input. Defaults to 1e-3.
        center, scale: bool, whether there is an offset `beta`, a factor `gamma`. Default to True.
        beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer, beta_regularizer,
            gamma_regularizer, beta_constraint, gamma_constraint: as in Keras, for these weights.
        renorm, renorm_clipping, renorm_momentum: batch renormalization, as in Keras.
        synchronized: bool, whether the statistics are those of all the replicas' batches, with a mask as well.
            Defaults to False.
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
        if mask is not None and len(mask.shape) != len(x.shape) - 1:
            raise ValueError(
                "The mask provided should be one dimension less than the inputs. Received: "
                f"mask.shape={mask.shape}, inputs.shape={x.shape}"
            )
        by_batch = bool(training) and self.trainable
        if not by_batch:
            mask = None  # the moving statistics are the same for all elements
        elif self.renorm:
            return super().call(x, training=training, mask=mask)

        fused = (
            self.axis % len(x.shape) == len(x.shape) - 1
            and self.epsilon >= _FUSED_EPSILON_MIN
            and x.dtype != tf.float64
            and mask is None
            and not (by_batch and self.synchronized)
            and not (by_batch and _has_channels_left_over(x) and fusion.pays(x))
            # XLA fuses the written-out formula just as well, and expands the fused op into E[x^2] - E[x]^2, which for
            # a mean of 10000 and a variance of 1 gave a variance of 48.
            and not execution.in_xla_context()
        )
        if not (fused or by_batch):
            return super().call(x, training=False)
        outputs, mean, variance, there = self._fused(x, by_batch) if fused else self._written_out(x, mask)
        if by_batch:
            self._move(mean, variance, there)
        return tf.cast(outputs, self.compute_dtype)

    def _fused(self, x: Any, by_batch: bool) -> tuple[Any, Any, Any, Any]:
        """The normalized input, the statistics it was normalized by, and whether there are any, from one kernel."""
        channels = x.shape[-1]
        # The kernel takes rank 4. The elements stand in its second axis, as cuDNN limits the size of the first.
        images = x if len(x.shape) == 4 else tf.reshape(x, [1, -1, 1, channels])
        weights = (
            keras.ops.cast(self.gamma, "float32") if self.scale else tf.ones([channels]),
            keras.ops.cast(self.beta, "float32") if self.center else tf.zeros([channels]),
        )
        moving = [] if by_batch else [keras.ops.cast(m, "float32") for m in (self.moving_mean, self.moving_variance)]
        kernel = _kernel_in_float32 if _has_channels_left_over(x) else _kernel
        outputs, mean, variance, *_ = kernel(images, *weights, *moving, epsilon=self.epsilon)
        if len(x.shape) != 4:
            outputs = fusion.shaped(tf.reshape(outputs, tf.shape(x)), x.shape)
        # The kernel divides by n - 1 (by 1 where n is 1) for the variance it answers; Keras moves by that of n.
        n = tf.cast(tf.size(x, tf.int64) // channels, tf.float32)
        return outputs, mean, variance * ((n - 1.0) / n), n > 0

    def _written_out(self, x: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
        """The same in training, in ops that any device and compiler takes."""
        axis = self.axis % len(x.shape)
        if mask is None and not self.synchronized:
            axes = tuple(a for a in range(len(x.shape)) if a != axis)
            weights = {"gamma": self.gamma, "beta": self.beta}
            outputs, variance, mean = normalize_with_statistics(
                self, x, weights, axes=axes, groups=(axis, x.shape[axis])
            )
            return outputs, tf.reshape(mean, [-1]), tf.reshape(variance, [-1]), tf.size(x) > 0
        x = tf.cast(x, keras.backend.result_type(x.dtype, "float32"))
        mean, variance, count = self._sums(x, mask)
        there = count > 0
        shape = [x.shape[axis] if a == axis else 1 for a in range(len(x.shape))]
        scale = tf.math.rsqrt(variance + self.epsilon)
        if self.scale:
            scale *= keras.ops.cast(self.gamma, x.dtype)
        # Centred before it is scaled: x * scale - mean * scale cancels digits where the mean is large.
        outputs = (x - tf.reshape(mean, shape)) * tf.reshape(scale, shape)
        if self.center:
            outputs += tf.reshape(keras.ops.cast(self.beta, x.dtype), shape)
        return outputs, mean, variance, there

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """What Keras's `call` normalizes by, where `renorm` leaves the rest to it."""
        return self._sums(inputs, mask)[:2]

    def _sums(self, x: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Mean, variance and number of elements of each channel: those the mask shows, in all synchronized replicas.

        Keras takes synchronized replicas' variance for E[x^2] - E[x]^2, of which nothing is right where the mean is
        large, and does not synchronize where there is a mask. Here the squares are of what is left of the elements when
        the mean of all replicas is subtracted, which takes two collectives, one after the other, for Keras's three.
        """
        axis, rank = self.axis % len(x.shape), len(x.shape)
        axes = [a for a in range(rank) if a != axis]
        channels, shape = x.shape[axis], [x.shape[axis] if a == axis else 1 for a in range(rank)]
        replicas = tf.distribute.get_replica_context() if self.synchronized else None

        def total(*sums: Any) -> list[Any]:
            if replicas is None:
                return list(sums)
            # In one collective.
            return tf.split(replicas.all_reduce(tf.distribute.ReduceOp.SUM, tf.concat(sums, 0)), len(sums))

        def shown(elements: Any) -> Any:
            return elements if mask is None else tf.where(there, elements, tf.zeros([], x.dtype))

        if mask is None:
            count = tf.cast(tf.size(x, tf.int64) // channels, x.dtype)
        else:
            there = tf.expand_dims(tf.cast(mask, tf.bool), -1)
            count = tf.reduce_sum(tf.cast(there, x.dtype), axes)
            if axis != rank - 1:  # the mask has one element for all of the last axis
                count *= tf.cast(tf.shape(x)[-1], x.dtype)
        mean, count = total(tf.reduce_sum(shown(x), axes), tf.broadcast_to(count, [channels]))
        mean = tf.math.divide_no_nan(mean, count)
        (squares,) = total(tf.reduce_sum(tf.square(shown(x - tf.reshape(mean, shape))), axes))
        return mean, tf.math.divide_no_nan(squares, count), count

    def _move(self, mean: Any, variance: Any, there: Any) -> None:
        """Moves the moving statistics towards the batch's, in the channels where those are finite.

        An empty batch has none, and one with NaN or an overflow is one that the optimizer skips: once in the moving
        statistics, NaN would stay for ever.
        """
        finite = tf.math.is_finite(mean) & tf.math.is_finite(variance) & there
        for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = keras.ops.cast(moving, statistic.dtype)
            new = old * self.momentum + statistic * (1.0 - self.momentum)
            moving.assign(tf.where(finite, new, old))


def _has_channels_left_over(x: tf.Tensor) -> bool:
    """Whether the fused kernel is faster in float32, casts and all, and what XLA makes of the formula faster than that.

    oneDNN's for bfloat16 takes sixteen channels at a time, and several times as long where some are left over.
    """
    return bool(x.dtype == tf.bfloat16 and x.shape[-1] % 16 and execution.on_cpu())


def _kernel(images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *moving: tf.Tensor, epsilon: float) -> Any:
    """TensorFlow's fused kernel: outputs, mean, variance, and what its gradient wants to get."""
    mean, variance = moving or [tf.zeros([0])] * 2
    return tf.raw_ops.FusedBatchNormV3(
        x=images, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=epsilon, is_training=not moving
    )


def _kernel_in_float32(images: tf.Tensor, *weights: tf.Tensor, epsilon: float) -> Any:
    """The same in float32, of which 16 bits alone are kept for the backward pass."""

    def run(images: tf.Tensor, *weights: tf.Tensor) -> Any:
        outputs, *others = _kernel(tf.cast(images, tf.float32), *weights, epsilon=epsilon)
        return tf.cast(outputs, images.dtype), *others

    @fusion.custom_gradient
    def normalize(images: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, *moving: tf.Tensor) -> Any:
        outputs, mean, variance, *reserved = run(images, gamma, beta, *moving)

        def gradient(upstream: tf.Tensor, *_: tf.Tensor) -> Any:
            to_images, to_gamma, to_beta, *_rest = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=tf.cast(upstream, tf.float32),
                x=tf.cast(fusion.not_before(upstream, images), tf.float32),
                scale=gamma,
                reserve_space_1=moving[0] if moving else reserved[0],
                reserve_space_2=moving[1] if moving else reserved[1],
                reserve_space_3=reserved[2],
                epsilon=epsilon,
                is_training=not moving,
            )
            return tf.cast(to_images, images.dtype), to_gamma, to_beta, *[None for _ in moving]

        return (outputs, mean, variance), gradient

    # An export holds no gradient that only this package knows.
    return normalize(images, *weights) if execution.recording() else run(images, *weights)
