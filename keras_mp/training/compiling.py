"""Whether XLA compiles the passes of a model, and what its errors mean."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import keras_models
from keras_mp.distribution import workers
from keras_mp.errors import CompilationError, KerasMPError, WorkerLostError
from keras_mp.training.forward_backward import ForwardBackward

__all__ = ["choose_jit_compile", "errors_in_words"]


def choose_jit_compile(
    model: keras.Model, asked: "bool | str", run_eagerly: bool, has_own_step: bool
) -> tuple[bool, str]:
    """Whether XLA compiles the passes, and why.

    Args:
        model: the model that is compiled.
        asked: its `jit_compile`.
        run_eagerly: as in Keras.
        has_own_step: whether its class has a `train_step` of its own.
    """
    unable = [
        f"{layer.name!r} ({type(layer).__name__})" for layer in keras_models.layers(model) if not layer.supports_jit
    ]
    if asked is False:
        return False, "jit_compile=False"
    if run_eagerly:
        return bool(asked is True), "not compiled: run_eagerly=True runs op by op"
    if asked is True:
        if unable:
            raise CompilationError(
                f"jit_compile=True: XLA cannot compile {_listed(unable)} of {model.name!r}. Apply what prepares "
                "data in dataset.map(...) before the model, or compile the model with jit_compile=False."
            )
        return True, f"jit_compile=True: XLA compiles {_what_is_compiled(model, has_own_step)}."
    if unable:
        return False, f'not compiled: jit_compile="auto", and XLA cannot compile {_listed(unable)}.'
    here = hardware.detect_for(model.distribute_strategy)
    if not here.recommended_jit_compile:
        return False, f'not compiled: jit_compile="auto". {here.reason}'
    return True, f'jit_compile="auto": XLA compiles {_what_is_compiled(model, has_own_step)}. {here.reason}'


def _what_is_compiled(model: keras.Model, has_own_step: bool) -> str:
    names = ForwardBackward(model).synchronized_layers() if model.distribute_strategy.num_replicas_in_sync > 1 else []
    between = f" between the layers that add up over replicas ({_listed(map(repr, names))})" if names else ""
    several = model.distribute_strategy.num_replicas_in_sync > 1
    of_base = " of `super().train_step`" if several and has_own_step else ""
    return f"the forward and backward pass{of_base}{between}"


@contextlib.contextmanager
def errors_in_words(model: keras.Model) -> Iterator[None]:
    """Where a worker is lost or XLA fails in the block, raises an error that says so."""
    try:
        yield
    except tf.errors.OpError as error:
        if isinstance(error, KerasMPError):
            raise
        words = workers.explain_loss(error, model.distribute_strategy)
        if words:
            raise WorkerLostError(words) from error
        if model.jit_compile and "XLA" in error.message:
            raise CompilationError(_explain_compiler(model, error.message)) from error
        raise


def _explain_compiler(model: keras.Model, message: str) -> str:
    # Operations are named by the scopes they were made in, and each layer opens one of its name, or with a number.
    parts = set(re.findall(r"[\w.-]+", " ".join(re.findall(r"\{\{node ([^}]*)\}\}", message))))
    parts |= {re.sub(r"_\d+$", "", part) for part in parts}
    inner = [layer for layer in keras_models.children(model) if layer.name in parts]
    leaves = [layer for layer in inner if not any(each in inner for each in keras_models.children(layer))]
    named = [f"{layer.name!r} ({type(layer).__name__})" for layer in leaves]
    operations = ", ".join(sorted(set(re.findall(r"(\w+) \(No registered", message))))
    what = f"XLA cannot compile {_listed(named) if named else 'a part'} of {model.name!r}"
    return (
        f"{what}{f': it uses {operations}' if operations else ''}. Apply what prepares data in dataset.map(...) "
        f"before the model, or compile the model with jit_compile=False. XLA says: {message}"
    )


def _listed(names: Any) -> str:
    names = list(names)
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
