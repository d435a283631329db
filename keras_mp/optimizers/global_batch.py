"""The gradients of the global batch, added up over replicas and workers."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp.distribution import replicas
from keras_mp.optimizers.weight_update import replaces_variable, unscale

__all__ = ["over_replicas", "reciprocal_if"]


def over_replicas(
    grads: list[Any],
    variables: list[keras.Variable],
    loss_finite: "tf.Tensor | bool",
    scale: tf.Tensor,
    *,
    unscaled: bool,
    reduce_dtype: str,
) -> tuple[list[Any], tf.Tensor]:
    """Unscaled gradients of the global batch, and whether the loss was finite on every replica.

    Gradients are unscaled before they are added up: the sum of scaled ones may overflow where the gradient does
    not. A value that is not finite on one replica makes the sum so on all of them.
    """
    replaced = [replaces_variable(v) for v in variables]
    scaled = reduce_dtype == "float16"  # unscaled, it would underflow

    def prepared(gradient: Any) -> Any:
        if unscaled != scaled:  # it is as it is to be sent
            return _as_dtype(gradient, reduce_dtype)
        return _as_dtype(unscale(gradient, reciprocal_if(unscaled, scale)), reduce_dtype)

    given = [None if g is None or over else prepared(g) for g, over in zip(grads, replaced, strict=True)]
    *sums, bad_losses = replicas.sum_over_replicas([*given, tf.where(loss_finite, 0.0, 1.0)])
    if reduce_dtype != "float32":
        sums = [None if s is None else unscale(s, scale if scaled else tf.ones([])) for s in sums]
    for index, (gradient, over) in enumerate(zip(grads, replaced, strict=True)):
        if over and gradient is not None:
            # The history of largest values, and a scale that grows with them: the global batch has their maximum.
            sums[index] = replicas.maximum_over_replicas(gradient)
    return sums, bad_losses == 0


def reciprocal_if(condition: bool, scale: tf.Tensor) -> tf.Tensor:
    """The scale or one over it, for `unscale` to divide by."""
    return tf.math.reciprocal(scale) if condition else scale


def _as_dtype(gradient: "tf.Tensor | tf.IndexedSlices", dtype: str) -> "tf.Tensor | tf.IndexedSlices":
    if dtype == "float32":
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype)
