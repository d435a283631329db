"""Compiles the copy of a model as the model is, with optimizers that go on from the same state."""

from collections.abc import Callable
from typing import Any

import keras

from keras_mp._compat import keras_models, keras_optimizers
from keras_mp.conversion.clone import Rebuild
from keras_mp.errors import ConversionError
from keras_mp.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras_mp.policies.policy import needs_loss_scaling
from keras_mp.training.model import Model

__all__ = ["compile_alike"]


def compile_alike(model: keras.Model, copy: keras.Model, rebuild: Rebuild, keeps_wrapper: bool = False) -> None:
    """Compiles the copy of a model and the models in it, and sets the optimizers that attributes hold.

    Args:
        model: a Keras model.
        copy: its copy.
        rebuild: what has made the copy.
        keeps_wrapper: whether an optimizer stays wrapped as it was. Otherwise the dtypes of the copy decide.
    """
    made: dict[int, keras.optimizers.Optimizer] = {}

    def carry(optimizer: keras.optimizers.Optimizer, owner: keras.Model = copy) -> keras.optimizers.Optimizer:
        if id(optimizer) not in made:
            wraps = keeps_wrapper if keeps_wrapper else needs_loss_scaling(owner)
            made[id(optimizer)] = _carried(optimizer, rebuild, wraps, keeps_wrapper)
        return made[id(optimizer)]

    for each, copied in rebuild.compiled:
        _compile(each, copied, rebuild, carry)
    rebuild.set_optimizers(carry)


def _compile(
    model: keras.Model, copy: keras.Model, rebuild: Rebuild, carry: Callable[..., keras.optimizers.Optimizer]
) -> None:
    arguments = keras_models.compile_arguments(model)
    loss = arguments["loss"]
    for name in ("metrics", "weighted_metrics"):
        arguments[name] = keras.tree.map_structure(_fresh_metric, arguments[name])
    for name in ("loss", "loss_weights"):
        arguments[name] = rebuild.value(arguments[name])  # a loss may hold layers
    arguments["optimizer"] = None if model.optimizer is None else carry(model.optimizer, copy)
    # A `compile` of the user's has set attributes, which are copied already.
    if isinstance(copy, Model):
        arguments["jit_compile"] = model.get_compile_config()["jit_compile"]
        Model.compile(copy, **arguments, auto_scale_loss=False)
    else:
        keras.Model.compile(copy, **arguments, auto_scale_loss=False)
    if model.loss is not loss:  # set after `compile`
        copy.loss = rebuild.value(model.loss)


def _carried(
    optimizer: keras.optimizers.Optimizer, rebuild: Rebuild, wraps: bool, keeps_wrapper: bool
) -> keras.optimizers.Optimizer:
    """A copy of an optimizer with its state, on the variables of the copy of a model.

    Args:
        optimizer: the original.
        rebuild: what has made the copy of the model.
        wraps: whether the copy is wrapped in a `LossScaleOptimizer`.
        keeps_wrapper: whether it is wrapped as the original is.
    """
    wrapped = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if wrapped else optimizer
    copy = rebuild.optimizer(inner)
    if not (wrapped if keeps_wrapper else wraps):
        if wrapped:
            copy.loss_scale_factor = getattr(optimizer, _FACTOR, None)
        return copy
    factor = getattr(optimizer, _FACTOR, None) if wrapped else copy.loss_scale_factor
    if keeps_wrapper or isinstance(optimizer, LossScaleOptimizer):
        outer = type(optimizer)(**{**_config(optimizer), "inner_optimizer": copy})
    elif wrapped:
        outer = LossScaleOptimizer(copy, optimizer.initial_scale, optimizer.dynamic_growth_steps)
    else:
        outer = LossScaleOptimizer(copy)
    setattr(outer, _FACTOR, factor)
    if inner.built:
        with keras_optimizers.built_already(copy):
            outer.build(keras_optimizers.trained_by(copy))
    if wrapped and optimizer.built:
        _assign_state(outer, optimizer)
    return outer


# A wrapper takes the fixed factor of the loss from the optimizer in it. It gets it back when the wrapper is taken off.
_FACTOR = "factor_without_wrapper"


def _config(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Returns the arguments of a wrapper, without its inner optimizer, which may have no configuration."""
    inner, optimizer.inner_optimizer = optimizer.inner_optimizer, keras.optimizers.SGD()
    try:
        return optimizer.get_config()
    finally:
        optimizer.inner_optimizer = inner


def _assign_state(wrapper: keras.optimizers.Optimizer, other: keras.optimizers.Optimizer) -> None:
    """Gives a wrapper the state of another. Keras's own wrapper has less state than ours."""
    inner = {id(variable) for each in (wrapper, other) for variable in each.inner_optimizer.variables}
    values = {variable.name: variable for variable in other.variables if id(variable) not in inner}
    for variable in wrapper.variables:
        if id(variable) not in inner and variable.name in values:
            variable.assign(values[variable.name])


def _fresh_metric(metric: Any) -> Any:
    if not isinstance(metric, keras.Metric):
        return metric
    try:
        return type(metric).from_config(metric.get_config())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{metric.name!r} of class {type(metric).__name__} cannot be made again from its configuration: {error} "
            "Define `get_config`, and register functions with @keras.saving.register_keras_serializable()."
        ) from error
