"""What the arguments of `LossScaleOptimizer` may be, and which of them Keras's wrapper does not have."""

from typing import Any

import keras

from keras_mp._compat import keras_files
from keras_mp.errors import ArgumentError

__all__ = ["as_optimizer", "check", "not_default", "refuse_h5", "refuse_those_of_inner"]

# Keras's optimizers take these; on a wrapper they do nothing. Old files hold them with these values.
_INNER_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 0.0,
    "weight_decay": None,
    "clipnorm": None,
    "global_clipnorm": None,
    "clipvalue": None,
    "use_ema": False,
    "ema_momentum": 0.99,
    "ema_overwrite_frequency": None,
    "loss_scale_factor": None,
    "gradient_accumulation_steps": None,
}

# Those that Keras's wrapper does not have, with their defaults.
_OWN_ARGUMENTS: dict[str, Any] = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "hysteresis": 1,
    "min_scale": 2.0**-14,
    "max_scale": 2.0**24,
    "max_consecutive_skips": 50,
    "dynamic": True,
    "jit_compile": "auto",
    "reduce_dtype": "float32",
    "sum_repeated_ids": False,
}


def refuse_those_of_inner(kwargs: dict[str, Any]) -> None:
    """Takes arguments that belong on the inner optimizer out of `kwargs`; an error where they would do something."""
    for argument, default in _INNER_ARGUMENTS.items():
        value = kwargs.pop(argument, default)
        if value != default:
            raise ArgumentError(
                f"LossScaleOptimizer does not take `{argument}`. Received: {argument}={value!r}. Set it on the "
                f"`inner_optimizer`: LossScaleOptimizer(keras.optimizers.Adam({argument}={value!r}))"
            )


def check(max_consecutive_skips: int, reduce_dtype: str, sum_repeated_ids: bool) -> None:
    """Raises an error for an argument of the wrapper that is out of range."""
    if (
        isinstance(max_consecutive_skips, bool)
        or not isinstance(max_consecutive_skips, int)
        or max_consecutive_skips < 1
    ):
        raise ArgumentError(
            "`max_consecutive_skips` must be an integer of at least 1. Received: "
            f"max_consecutive_skips={max_consecutive_skips!r}"
        )
    if reduce_dtype not in ("float32", "bfloat16", "float16"):
        raise ArgumentError(
            f'`reduce_dtype` must be "float32", "bfloat16" or "float16". Received: reduce_dtype={reduce_dtype!r}'
        )
    if not isinstance(sum_repeated_ids, bool):
        raise ArgumentError(
            f"`sum_repeated_ids` must be True or False. Received: sum_repeated_ids={sum_repeated_ids!r}"
        )


def not_default(arguments: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments that Keras's wrapper does not have, those that differ from their defaults."""
    return {name: arguments[name] for name, default in _OWN_ARGUMENTS.items() if arguments[name] != default}


def as_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
    """The optimizer that is to be wrapped, given as itself, by its name or by its configuration."""
    if isinstance(optimizer, (str, dict)):
        optimizer = keras.optimizers.get(optimizer)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise ArgumentError(
            f"`inner_optimizer` already scales its loss. Received: {type(optimizer).__name__} around "
            f"{type(optimizer.inner_optimizer).__name__}. Wrap what is inside: "
            "LossScaleOptimizer(optimizer.inner_optimizer)"
        )
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ArgumentError(
            "`inner_optimizer` must be a keras.optimizers.Optimizer or the name of one, such as "
            f"keras.optimizers.Adam(1e-3) or 'adam'. Received: {optimizer!r} (of type {type(optimizer).__name__})"
        )
    return optimizer


def refuse_h5() -> None:
    """Raises an error where the arguments are asked for to be written into a file that would lose the state."""
    if keras_files.saving_to_h5():
        raise ArgumentError(
            "A .h5 file does not keep the state of a LossScaleOptimizer: the slots of the inner optimizer and the "
            'loss scale would be lost without a word. Save to a format that keeps them: model.save("model.keras"), '
            'model.save_weights("model.weights.h5") or tf.train.Checkpoint(model=model, optimizer=optimizer). '
            "For a .h5 file without the optimizer: keras.saving.save_model(model, path, include_optimizer=False)."
        )
