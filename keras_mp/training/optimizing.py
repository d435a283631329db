"""What a model has its optimizer do: scale the loss, and apply the gradients."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_models
from keras_mp.distribution import replicas
from keras_mp.optimizers.loss_scale_optimizer import LossScaleOptimizer

__all__ = ["apply", "computes_in_float16", "scaling_of"]


def scaling_of(model: keras.Model, optimizer: Any, automatic: bool) -> str:
    """In words, how the loss is scaled by an optimizer, or by the one that is put around it."""
    if isinstance(optimizer, LossScaleOptimizer):
        return f"LossScaleOptimizer, reduce_dtype={optimizer.reduce_dtype!r}"
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return "Keras's LossScaleOptimizer"
    wraps = automatic and optimizer is not None and computes_in_float16(model)
    return "LossScaleOptimizer, reduce_dtype='float32'" if wraps else "none"


def computes_in_float16(model: keras.Model) -> bool:
    """Whether any layer does."""
    return any(layer.compute_dtype == "float16" for layer in keras_models.layers(model))


def apply(optimizer: Any, gradients: list[Any], variables: list[keras.Variable]) -> None:
    """Has an optimizer of any class apply the gradients of a step, on one replica or several."""
    if not isinstance(optimizer, LossScaleOptimizer):  # which casts where it computes with them
        pairs = zip(gradients, variables, strict=True)
        gradients = [gradient if gradient is None else tf.cast(gradient, v.dtype) for gradient, v in pairs]
    if isinstance(optimizer, LossScaleOptimizer) or not tf.distribute.has_strategy():
        optimizer.apply(gradients, variables)
    else:
        replicas.apply_on_each_device(optimizer, gradients, variables)
