"""One forward and backward pass over a batch that leaves the model as it was."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_models
from keras_mp.diagnostics.statistics import Statistics
from keras_mp.diagnostics.taps import Tap, Taps
from keras_mp.errors import ArgumentError

__all__ = ["Pass", "run", "unpacked"]


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass over a batch gave.

    Attributes:
        loss: the loss, without a loss scale.
        taps: statistics of outputs and gradients, in the order in which the layers' calls ended.
        weights: the values of the trainable variables, by path "layer path/variable name".
        gradients: the gradients of the loss times the scale to them. None where there is none.
    """

    loss: float
    taps: dict[Tap, Statistics]
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray | None]


def unpacked(model: keras.Model, batch: Any) -> tuple[Any, Any, Any]:
    """Returns `(x, y, sample_weight)` of a batch for a model, both checked.

    Args:
        model: a compiled Keras model.
        batch: `(x, y)` or `(x, y, sample_weight)`, as `fit` takes them.

    Raises:
        ArgumentError: for what is not a compiled model, or a batch without labels.
    """
    if not isinstance(model, keras.Model):
        raise ArgumentError(f"Expected a Keras model. Received: {model!r} of type {type(model).__name__}.")
    if not model.compiled:
        raise ArgumentError(
            f"The model {model.name!r} is not compiled, so it has no loss. Call `model.compile(optimizer, loss)` first."
        )
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        given = f"a {type(batch).__name__}" + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        raise ArgumentError(
            f"Expected a batch `(x, y)` or `(x, y, sample_weight)`, as `fit` takes it. Received: {given}. "
            "Of a tf.data.Dataset, give `next(iter(dataset))`."
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tuple(batch))
    x, y, sample_weight = (
        keras.tree.map_structure(lambda each: None if each is None else tf.convert_to_tensor(each), given)
        for given in (x, y, sample_weight)
    )
    rows = {len(each) for each in keras.tree.flatten((x, y)) if each.shape.rank}
    if len(rows) > 1:
        raise ArgumentError(f"Expected inputs and labels of as many rows each. Received: {sorted(rows)} rows.")
    return x, y, sample_weight


def run(
    model: keras.Model,
    batch: tuple[Any, Any, Any],
    *,
    scale: float = 1.0,
    what: Sequence[str] = ("output", "gradient"),
    see: Callable[[Tap, np.ndarray], None] | None = None,
) -> Pass:
    """Runs the forward and the backward pass of a training step, without an update.

    What the pass changes besides, such as moving averages and the states of random generators, is put back.

    Args:
        model: a compiled model.
        batch: what `unpacked` returned.
        scale: what the loss is multiplied by before gradients are taken.
        what: see `Taps`.
        see: see `Taps`.

    Raises:
        ArgumentError: where the model does not take the batch.
    """
    x, y, sample_weight = batch
    try:
        keras_models.build(model, batch)
    except Exception as error:
        raise ArgumentError(f"The model {model.name!r} does not take this batch: {error}") from error
    taps = Taps(model, what=what, see=see)
    variables = model.trainable_variables

    def step() -> Any:
        with tf.GradientTape() as tape:
            outputs = keras_models.call(model, x, training=True)
            loss = keras_models.compute_loss(model, x, y, outputs, sample_weight, True)
            scaled = tf.cast(loss, tf.float32) * scale
        return loss, tape.gradient(scaled, [variable.value for variable in variables])

    with _unchanged(model), taps.active():
        loss, gradients = tf.function(step, jit_compile=False, autograph=False)()
    names = _names(model)
    return Pass(
        float(loss),
        taps.read(),
        {names[id(variable)]: keras.ops.convert_to_numpy(variable.value) for variable in variables},
        {names[id(v)]: _dense(gradient) for v, gradient in zip(variables, gradients, strict=True)},
    )


@contextlib.contextmanager
def _unchanged(model: keras.Model) -> Iterator[None]:
    """Inside, variables may change. Afterwards they have their values again."""
    variables = {id(v): v for v in [*model.non_trainable_variables, *model.metrics_variables]}
    variables |= {id(v): v for v in keras_models.seed_states(model)}
    values = {key: tf.identity(variable.value) for key, variable in variables.items()}
    try:
        yield
    finally:
        for key, variable in variables.items():
            variable.assign(values[key])


def _dense(gradient: Any) -> np.ndarray | None:
    return None if gradient is None else tf.cast(tf.convert_to_tensor(gradient), tf.float32).numpy()


def _names(model: keras.Model) -> dict[int, str]:
    """The path of each variable: that of the innermost layer that holds it, and its name."""
    names: dict[int, str] = {}
    for layer, path in keras_layers.paths_of_layers(model):
        for variable in layer.variables:
            names[id(variable)] = f"{path}/{variable.name}"
    return names
