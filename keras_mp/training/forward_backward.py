"""The forward and backward pass of a Keras model as a function without side effects, which XLA can compile.

Under a strategy XLA cannot compile what reads or writes the variables of several devices, nor what talks to other
replicas. So a replica's pass gets the values of the variables, and answers with gradients and with the new values of
what the layers changed. Who called it adds up over replicas and assigns.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_layers, keras_losses, keras_models, keras_variables
from keras_mp.distribution import replicas
from keras_mp.layers import Embedding

__all__ = ["ForwardBackward", "Pass"]

# Large and without a pattern, so that replicas' seeds stay apart from those of neighbouring layers.
_SEED_STRIDE = 0x1E3779B9


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one replica's pass over its rows gave.

    Args:
        loss: float32 scalar, this replica's share of the loss: the sum over replicas is that of the whole batch. None
            where only outputs were asked for.
        gradients: one for each trainable variable of the model, of the loss times the scale, in the variable's dtype
            or in the 16 bits that layers read it in; None where there is none.
        outputs: the model's outputs, with their masks.
        state: pairs of a variable that the layers assigned to, and its new value.
    """

    loss: tf.Tensor | None
    gradients: list[Any]
    outputs: Any
    state: list[tuple[keras.Variable, tf.Tensor]]


class ForwardBackward:
    """A model's pass over a batch, with or without gradients, compiled by XLA if asked for.

    Args:
        model: a built Keras model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._assigned: dict[str, keras.Variable] = {}
        self._compiled = tf.function(self._run_compiled, jit_compile=True, autograph=False, reduce_retracing=True)
        self._wants_totals = False

    def __call__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        training: bool,
        jit_compile: bool,
        scale: tf.Tensor | None = None,
        share: tf.Tensor | None = None,
        only_outputs: bool = False,
    ) -> Pass:
        """Runs the pass. Call it in a replica context, or without a strategy.

        Args:
            x: this replica's rows, as in `fit`.
            y: their labels.
            sample_weight: their weights.
            training: whether the layers train.
            jit_compile: whether XLA compiles the pass.
            scale: scalar that the loss is multiplied by before its gradients are taken; None takes no gradients.
            share: scalar, this replica's share of the batch's rows; None without other replicas.
            only_outputs: whether to compute no loss.
        """
        compiles = jit_compile and not execution.in_xla_context() and not tf.executing_eagerly()
        tables = set() if compiles or execution.in_xla_context() or tf.distribute.has_strategy() else self._tables()
        values = [v.value if id(v) in tables else tf.convert_to_tensor(v.value) for v in self._variables()]
        seeds = _replica_seed()
        arguments = (x, y, sample_weight, values, seeds, scale, share)
        settings: dict[str, Any] = {"training": training, "only_outputs": only_outputs}
        if compiles:
            if self._talks_to_other_replicas():
                # What lies between the collectives is compiled, the collectives are not.
                with tf.xla.experimental.jit_scope():
                    found = self._run(_total_over_replicas, *arguments, **settings)
            else:
                found = self._take_compiled(*arguments, **settings)
        else:
            found = self._run(_total_over_replicas, *arguments, **settings)
        outputs = keras.tree.map_structure(
            keras_layers.with_attachments, found["outputs"], found["masks"], found["logits"]
        )
        state = [(self._assigned[key], value) for key, value in found["state"].items()]
        return Pass(found["loss"], found["gradients"], outputs, state)

    def synchronized_layers(self) -> list[str]:
        """The names of the layers whose forward pass adds up over replicas."""
        return [layer.name for layer in keras_models.layers(self._model) if getattr(layer, "synchronized", False)]

    def _variables(self) -> list[keras.Variable]:
        # Metrics that layers or `compute_loss` update are state like any other.
        return list({id(v): v for v in [*self._model.variables, *self._model.metrics_variables]}.values())

    def _tables(self) -> set[int]:
        """The `id` of each variable of which rows are read, and which is not worth reading as a whole."""
        layers = [layer for layer in keras_models.layers(self._model) if isinstance(layer, Embedding)]
        return {id(variable) for layer in layers for variable in layer.variables}

    def _talks_to_other_replicas(self) -> bool:
        return tf.distribute.has_strategy() and bool(self.synchronized_layers())

    def _take_compiled(self, *arguments: Any, **settings: Any) -> dict[str, Any]:
        # A mean that divides by a number that only the pass knows, as of elements that are not masked, needs its sum
        # over replicas in the midst of the pass. So what makes that number is run before, without XLA; TensorFlow
        # leaves out of it all that nobody asks for.
        try:
            return self._compiled(self._totals(*arguments, **settings), *arguments, **settings)
        except _TotalsWantedError:
            self._wants_totals = True
            return self._compiled(self._totals(*arguments, **settings), *arguments, **settings)

    def _totals(self, *arguments: Any, **settings: Any) -> list[tf.Tensor]:
        counted: list[tf.Tensor] = []

        def count(value: tf.Tensor) -> tf.Tensor:
            counted.append(value)
            return value

        if self._wants_totals and not settings["only_outputs"]:
            x, y, sample_weight, values, seeds, _, share = arguments
            self._run(count, x, y, sample_weight, values, seeds, None, share, **settings)  # no scale, no gradients
        return replicas.sum_over_replicas(counted)

    def _run_compiled(self, totals: list[tf.Tensor], *arguments: Any, **settings: Any) -> dict[str, Any]:
        given = iter(totals)

        def total_of(_: tf.Tensor) -> tf.Tensor:
            total = next(given, None)
            if total is None:
                raise _TotalsWantedError
            return total

        return self._run(total_of, *arguments, **settings)

    def _run(
        self,
        total_of: Callable[[tf.Tensor], tf.Tensor],
        x: Any,
        y: Any,
        sample_weight: Any,
        values: list[tf.Tensor],
        seeds: tf.Tensor | None,
        scale: tf.Tensor | None,
        share: tf.Tensor | None,
        training: bool,
        only_outputs: bool,
    ) -> dict[str, Any]:
        model = self._model
        loss: Any = None
        gradients: list[Any] = []
        variables, trainable = self._variables(), model.trainable_variables
        random = {id(seed) for seed in keras_models.seed_states(model)} if seeds is not None else set()
        own = [
            value + tf.cast(seeds, value.dtype) if id(variable) in random else value
            for variable, value in zip(variables, values, strict=True)
        ]
        tape = tf.GradientTape() if scale is not None else contextlib.nullcontext()
        with (
            tape,
            _State(zip(variables, own, strict=True), trainable, tape) as state,
            keras_losses.share_of_batch(share, total_of),
        ):
            outputs = keras_models.call(model, x, training=training)
            if not only_outputs:
                loss = keras_models.compute_loss(model, x, y, outputs, sample_weight, training)
                loss = tf.cast(loss, tf.float64 if loss.dtype == tf.float64 else tf.float32)
                if share is not None:  # a mean over no rows may be NaN
                    loss = tf.where(share > 0, loss, tf.zeros_like(loss)) * tf.cast(share, loss.dtype)
            if scale is not None:
                scaled = loss * tf.cast(scale, loss.dtype)
        if scale is not None:
            gradients = state.gradients(tape, scaled)
        new = {}
        for variable, value in state.assigned.values():
            self._assigned[str(id(variable))] = variable
            new[str(id(variable))] = value - tf.cast(seeds, value.dtype) if id(variable) in random else value
        return {
            "loss": loss,
            "gradients": gradients,
            "outputs": outputs,
            # A tensor that leaves a compiled function keeps nothing of what Keras attaches to it.
            "masks": keras.tree.map_structure(keras_layers.mask_of, outputs),
            "logits": keras.tree.map_structure(keras_layers.logits_of, outputs),
            "state": new,
        }


def _total_over_replicas(value: tf.Tensor) -> tf.Tensor:
    return replicas.sum_over_replicas([value])[0]


class _TotalsWantedError(Exception):
    """A compiled pass divides by a number of which it was not given the sum over replicas."""


class _State(keras.StatelessScope):
    """Variables' values while a pass runs, and what was assigned to them."""

    def __init__(self, mapping: Any, trainable: Sequence[keras.Variable], tape: Any) -> None:
        super().__init__(mapping, collect_losses=True)
        self.assigned: dict[int, tuple[keras.Variable, tf.Tensor]] = {}
        self._tape = tape if isinstance(tape, tf.GradientTape) else None
        self._leaves: dict[int, list[tf.Tensor]] = {}
        if self._tape is not None:
            for variable in trainable:
                self._watch(variable, self.state_mapping[id(variable)])

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Notes an assignment in the place of doing it."""
        variable, value = update
        if id(variable) in self._leaves:
            # A weight that a layer assigned to, as spectral normalization does, is a new start for gradients: they are
            # those to the variable, whichever value it had when it was read.
            value = tf.stop_gradient(value)
            self._watch(variable, value)
        self.assigned[id(variable)] = (variable, value)
        super().add_update((variable, value))

    def get_current_value(self, variable: keras.Variable) -> Any:
        """The value of a variable, in the dtype in which it is read.

        A weight that a layer reads in 16 bits is a start for gradients in these: cast to float32, they would be written
        and read once more, before the optimizer computes with them in float32. What is read inside a loop or another
        function is none: TensorFlow differentiates these as a whole, and the gradient comes to the value.
        """
        value = super().get_current_value(variable)
        dtype = keras_variables.dtype_as_read(variable)
        if id(variable) not in self._leaves or dtype not in ("float16", "bfloat16"):
            return value
        assert self._tape is not None
        with self._tape.stop_recording():
            cast = tf.cast(value, dtype)
        self._watch(variable, cast)
        return cast

    def _watch(self, variable: keras.Variable, value: tf.Tensor) -> None:
        assert self._tape is not None
        self._tape.watch(value)
        self._leaves.setdefault(id(variable), []).append(value)

    def gradients(self, tape: tf.GradientTape, target: tf.Tensor) -> list[Any]:
        """The gradients to the trainable variables, in their order; None where there is none."""
        found = tape.gradient(target, list(self._leaves.values()))
        given = [[part for part in parts if part is not None] for parts in found]
        return [parts[0] if len(parts) == 1 else tf.add_n(map(_wide, parts)) if parts else None for parts in given]


def _wide(gradient: Any) -> Any:
    """A gradient in a dtype to add it to others in: float32 at least."""
    return gradient if gradient.dtype.size >= 4 else tf.cast(gradient, tf.float32)


def _replica_seed() -> tf.Tensor | None:
    """What this replica adds to the seeds, so that its random numbers are not the others'; None for one replica."""
    if not tf.distribute.has_strategy() or tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return None
    replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)
    return tf.stack([replica * _SEED_STRIDE, tf.zeros_like(replica)])
