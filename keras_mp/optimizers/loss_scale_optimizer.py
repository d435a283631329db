"""`LossScaleOptimizer`: Keras's wrapper of that name, with a loss scale that cannot run away or fall silent."""

import dataclasses
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import (
    execution,
    graph_errors,
    keras_files,
    keras_hooks,
    keras_optimizers,
    keras_variables,
    patches,
)
from keras_mp.distribution import replicas
from keras_mp.errors import ArgumentError, KerasMPWarning, LossScaleStuckError
from keras_mp.optimizers import half_variables, provenance
from keras_mp.optimizers.loss_scale import LossScaleState, LossScaling, all_finite, finite_witness, sum_of_squares
from keras_mp.optimizers.weight_update import WeightUpdate, replaces_variable, unscale
from keras_mp.policies.policy import needs_loss_scaling, stacklevel

__all__ = ["LossScaleOptimizer"]

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

# What Keras's wrapper does not have: arguments with their defaults, and state.
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
_OWN_STATE = ("hysteresis_left", "skipped_steps", "consecutive_skips", "nonfinite_losses")

# So many skipped steps at the start of a training are how a scale is found that fits, and no sign of trouble.
_SKIPS_OF_A_SEARCH = 3
# A loop of one's own has no epochs, after the first of which to say that most steps were skipped.
_STEPS_TO_JUDGE_BY = 100

_UNSCALED_LOSS = """LossScaleOptimizer divides gradients by its loss scale, and this loss was never multiplied by it: \
the updates would be thousands of times too small. Write

    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(compute_loss())
    gradients = tape.gradient(loss, variables)
    optimizer.apply_gradients(zip(gradients, variables))

or optimizer.minimize(compute_loss, variables), which does all of it."""


_CLIPPED_SCALED = """The gradients were limited by tf.{clipped} while they were still multiplied by the loss scale, \
so that they are thousands of times too small: the limit is meant for the gradients themselves. Write

    gradients = optimizer.unscale(tape.gradient(loss, variables))

before it; apply_gradients sees that they are unscaled. Or set `clipnorm`, `clipvalue` or `global_clipnorm` on the \
inner optimizer, which clips the sum over all replicas."""

_UNSCALED_ELSEWHERE = """optimizer.unscale(...) was called in one function and apply {} with gradients of unknown \
origin, which were taken for scaled ones, and unscaled. If they were unscaled before, call both in the same \
tf.function, or both outside of any."""


@keras.saving.register_keras_serializable(package="keras_mp")
class LossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """Wraps an optimizer so that float16 gradients neither underflow nor ruin the weights.

    The loss is multiplied by a scale before its gradients are taken, and the gradients are divided by it, in float32,
    before they are applied. Where any of them is not finite the step is skipped, which changes nothing but the state
    of the scale, and the scale backs off; after `dynamic_growth_steps` finite steps in a row it grows.

    It is a `keras.optimizers.LossScaleOptimizer` and goes wherever that goes: in `model.compile`, in a `train_step` of
    one's own, in a loop with `tf.GradientTape`. With finite gradients and the same factors its scale takes the same
    values.

    Args:
        inner_optimizer: the `keras.optimizers.Optimizer` that updates the weights, or its name. Clipping, weight decay,
            averaging and accumulation are set there.
        initial_scale: the first scale. Start high: it falls in a few steps and climbs in thousands.
        dynamic_growth_steps: after so many finite steps in a row the scale grows.
        growth_factor: what it is multiplied by then, at least 1. Powers of two make unscaling exact.
        backoff_factor: what it is multiplied by after non-finite gradients, between 0 and 1.
        hysteresis: how many non-finite steps with no finite one between them make it back off.
        min_scale: the floor, below which it never falls.
        max_scale: the ceiling, above which it never grows.
        max_consecutive_skips: so many skipped steps in a row raise `LossScaleStuckError`.
        dynamic: False keeps the scale at `initial_scale`; steps with non-finite gradients are skipped all the same.
        jit_compile: whether XLA compiles the update of the weights, which then takes one pass over them instead of one
            for each operation; nothing else of the step is touched. "auto" has Adam, AdamW and SGD done by kernels of
            TensorFlow, which are as fast and need no compiling, and compiles others where it pays: see
            `jit_compile_reason`. False takes Keras's operations one by one, for the same bits.
        reduce_dtype: the dtype in which replicas and workers add up their gradients. "bfloat16" or "float16" send half
            as much, and round each replica's gradient and the sums to 8 or 11 bits. In float16 the gradients are added
            up as they are, scaled, for its range; the scale then makes room for the sum.
        sum_repeated_ids: what an optimizer that squares gradients, such as Adam or Adagrad, does with the sparse
            gradient of a row that comes several times in a batch, such as the embedding of a frequent word. False adds
            up the squares, as Keras does, so that a model trains alike with this wrapper and without it. True adds up
            the gradients first and squares the sum, as for a dense gradient, and takes smaller steps on such rows.
        name: the optimizer's name.

    Raises:
        ArgumentError: for an argument out of range, one that belongs on the inner optimizer, or an inner optimizer that
            already scales its loss.
        LossScaleStuckError: from the training step that is the `max_consecutive_skips`-th in a row to be skipped. Where
            XLA compiles the whole step, which cannot raise, from the next reading of the state on the host instead; the
            end of `fit` reads it.

    Example:

    >>> import keras, keras_mp
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, dtype="mixed_float16")])
    >>> model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.Adam(1e-3)), loss="mse")
    >>> float(model.optimizer.loss_scale)
    32768.0

    In a loop of one's own:

    >>> optimizer, x = model.optimizer, tf.ones((2, 4))
    >>> with tf.GradientTape() as tape:
    ...     loss = optimizer.scale_loss(tf.reduce_mean(model(x) ** 2))
    >>> gradients = tape.gradient(loss, model.trainable_variables)
    >>> _ = optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    Clipped by hand, they are unscaled before; `apply` sees that they are:

    >>> with tf.GradientTape() as tape:
    ...     loss = optimizer.scale_loss(tf.reduce_mean(model(x) ** 2))
    >>> gradients = optimizer.unscale(tape.gradient(loss, model.trainable_variables))
    >>> gradients, norm = tf.clip_by_global_norm(gradients, 1.0)
    >>> _ = optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    Reference:

    - [Micikevicius et al., 2018, section 3.2](https://arxiv.org/abs/1710.03740)
    """

    def __init__(
        self,
        inner_optimizer: "keras.optimizers.Optimizer | str",
        initial_scale: float = 2.0**15,
        dynamic_growth_steps: int = 2000,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        hysteresis: int = 1,
        min_scale: float = 2.0**-14,
        max_scale: float = 2.0**24,
        max_consecutive_skips: int = 50,
        dynamic: bool = True,
        jit_compile: "bool | str" = "auto",
        reduce_dtype: str = "float32",
        sum_repeated_ids: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        patches.install_on_first_use()
        for argument, default in _INNER_ARGUMENTS.items():
            value = kwargs.pop(argument, default)
            if value != default:
                raise ArgumentError(
                    f"LossScaleOptimizer does not take `{argument}`. Received: {argument}={value!r}. Set it on the "
                    f"`inner_optimizer`: LossScaleOptimizer(keras.optimizers.Adam({argument}={value!r}))"
                )
        inner_optimizer = _as_optimizer(inner_optimizer)
        scaling = LossScaling(
            initial_scale=initial_scale,
            growth_steps=dynamic_growth_steps,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            hysteresis=hysteresis,
            min_scale=min_scale,
            max_scale=max_scale,
            dynamic=dynamic,
        )
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
        super().__init__(
            inner_optimizer, initial_scale=initial_scale, dynamic_growth_steps=dynamic_growth_steps, name=name, **kwargs
        )
        self.max_consecutive_skips = max_consecutive_skips
        self.reduce_dtype = reduce_dtype
        self._scaling = scaling
        self._update = WeightUpdate(inner_optimizer, jit_compile, sum_repeated_ids)
        # What `scale_loss` saw, for the `apply` of the same step: whether the loss was finite, and that it was called.
        self._loss_finite: dict[int, list[tf.Tensor]] = {}  # by thread, for replicas run in one each
        self._scale_was_used = False
        self._stuck_told_at = 0
        # What `unscale` did, for the `apply` of the same step: in a graph by marks, else by thread the gradients that
        # it was given; and whether it was called in a graph in which no gradients of it were applied.
        self._marks = provenance.Marks()
        self._unscaled_from: dict[int, list[Any]] = {}
        self._unscale_was_used = self._unscaled_in_graph = False
        self._steps_at_begin: tuple[int, int] | None = None
        self._told_of_skips = False

    @property
    def loss_scale(self) -> tf.Tensor:
        """The factor that the next loss is multiplied by, a float32 scalar tensor."""
        self._scale_was_used = True
        return self._marks.put(self._read().scale, provenance.SCALED)

    @property
    def skipped_steps(self) -> tf.Tensor:
        """How many steps were skipped since the start, an int64 scalar tensor."""
        return self._read().skipped_steps

    @property
    def consecutive_skips(self) -> tf.Tensor:
        """How many steps were skipped since the last one that was not, an int64 scalar tensor."""
        return self._read().consecutive_skips

    @property
    def last_step_skipped(self) -> tf.Tensor:
        """Whether the latest step was skipped, a bool scalar tensor."""
        return self._read().consecutive_skips > 0

    @property
    def jit_compile(self) -> "bool | str":
        """What was asked for: True, False or "auto"."""
        return self._update.jit_compile

    @property
    def sum_repeated_ids(self) -> bool:
        """Whether gradients of a row that comes several times are added up before they are squared."""
        return self._update.sum_repeated_ids

    @property
    def jit_compile_reason(self) -> str:
        """Whether XLA compiles the update of the weights, and if not, why, as the latest traced step decided."""
        return self._update.reason

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Leaves variables out of the weight decay of the inner optimizer, which is where it is set.

        Args:
            var_list: the variables, or None.
            var_names: patterns of their names, or None.
        """
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def build(self, var_list: Sequence[keras.Variable]) -> None:
        """Creates the state of the scale and the slots of the inner optimizer.

        Args:
            var_list: the variables to train.
        """
        if self.built:
            return  # as Keras's optimizers; its wrapper would start the scale anew and keep its state twice
        with half_variables.float32_slots():
            super().build(var_list)
        # Keras's wrapper made `dynamic_scale` and `step_counter`. These follow them, so that the variables of a file
        # that Keras's wrapper wrote are a subsequence of ours.
        self._own_state = {
            name: self.add_variable(
                shape=(),
                dtype="int64",
                initializer=keras.initializers.Constant(self._scaling.hysteresis if name == "hysteresis_left" else 0),
                aggregation="none",
                name=name,
            )
            for name in _OWN_STATE
        }
        # Nadam keeps a running product that Keras tracks nowhere, so that no file would hold it.
        known = {id(v) for v in self.variables}
        strays = [
            value
            for optimizer in self._update.optimizers
            for value in vars(optimizer).values()
            if isinstance(value, keras.Variable) and id(value) not in known
        ]
        for variable in strays:
            keras_optimizers.track(self, variable)
        self._added_variables = [*self._own_state.values(), *strays]

    def scale_loss(self, loss: Any) -> tf.Tensor:
        """Multiplies the loss by the scale. Call it inside the tape, on the loss whose gradients are taken.

        It may be called for several losses of a step. Where one of them is not finite, and the step is skipped for it,
        `LossScaleStuckError` says so.

        Args:
            loss: tensor or number of any shape. A 16-bit loss is cast to float32 first: scaled in float16, a loss of 3
                is infinite.

        Returns:
            The scaled loss, float32 (float64 where the loss is).
        """
        self._scale_was_used = True
        loss = tf.convert_to_tensor(loss)
        loss = tf.cast(loss, tf.float64 if loss.dtype == tf.float64 else tf.float32)
        thread = threading.get_ident()
        self._loss_finite[thread] = [*self._losses_seen(), tf.reduce_all(tf.math.is_finite(loss))]
        self._unscaled_from.pop(thread, None)  # another step begins
        return loss * tf.cast(self._marks.put(self._state().scale, provenance.SCALED), loss.dtype)

    def unscale(self, gradients: Any) -> Any:
        """Divides gradients of the scaled loss by the scale, to clip or log them, add noise, or take their norm.

        `apply` takes gradients as they come from the tape, and such as this returned or as were made of them by any
        arithmetic; it sees which they are, where both are called in the same `tf.function` or both outside of one.
        Unscaling for a log changes nothing. In eager code, where no graph tells what a tensor was made of, those
        applied after an `unscale` count as unscaled unless they are the very ones that it was given.

        Args:
            gradients: as `tape.gradient` returned them: a list, tuple or other structure of dense tensors,
                `tf.IndexedSlices` and `None`, of any float dtype.

        Returns:
            The same structure with float32 gradients (float64 where they are), sparse where they were. What was
            infinite is NaN, so that no clipping makes a finite number of it and `apply` skips the step.

        Example:

        >>> import keras, keras_mp
        >>> weight = keras.Variable([3.0, 4.0])
        >>> optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(1.0))
        >>> with tf.GradientTape() as tape:
        ...     loss = optimizer.scale_loss(tf.reduce_sum(weight.value**2) / 2)
        >>> gradients = optimizer.unscale(tape.gradient(loss, [weight.value]))
        >>> clipped, norm = tf.clip_by_global_norm(gradients, 2.5)
        >>> optimizer.apply(clipped, [weight])
        >>> float(norm), weight.numpy().tolist()
        (5.0, [1.5, 2.0])
        """
        self._scale_was_used = self._unscale_was_used = True
        scale = self._state().scale
        gradients = gradients if tf.is_tensor(gradients) or hasattr(gradients, "__len__") else list(gradients)
        if tf.executing_eagerly():
            given = self._unscaled_from.setdefault(threading.get_ident(), [])
            given += [each for each in tf.nest.flatten(gradients) if each is not None]
        else:
            self._unscaled_in_graph = True

        def unscaled(gradient: Any) -> Any:
            if gradient is None:
                return None
            if isinstance(gradient, tf.IndexedSlices):
                return tf.IndexedSlices(unscaled(gradient.values), gradient.indices, gradient.dense_shape)
            quotient = unscale(gradient, scale)
            quotient = tf.where(tf.math.is_finite(quotient), quotient, tf.cast(float("nan"), quotient.dtype))
            return self._marks.put(quotient, provenance.UNSCALED)

        return tf.nest.map_structure(unscaled, gradients)

    def apply(
        self,
        grads: "Sequence[tf.Tensor | tf.IndexedSlices | None]",
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Unscales the gradients and applies them, or skips the step where one of them is not finite.

        Args:
            grads: gradients of the scaled loss, one for each variable, of any float dtype, dense or
                `tf.IndexedSlices`, as they are or made of what `unscale` returned. Where the gradient is `None` the
                variable stays as it is.
            trainable_variables: what to update; by default what the optimizer was built on.

        Raises:
            ArgumentError: for a gradient made of both scaled and unscaled ones.
            LossScaleStuckError: when this is the `max_consecutive_skips`-th step in a row to be skipped.
            ValueError: for variables that the optimizer was not built on, or no gradient at all.
        """
        grads = list(grads)
        if not grads:
            return
        if tf.distribute.in_cross_replica_context():
            raise ValueError(
                "`apply` was called in a cross-replica context, where there is one gradient for each replica. Call it "
                "in the function that strategy.run(...) runs."
            )
        variables = self._variables_for(grads, trainable_variables)
        if not self._scale_was_used:
            self._scale_was_used = True
            warnings.warn(_UNSCALED_LOSS, KerasMPWarning, stacklevel=3)
        loss_finite, scale = self._take_loss_finite(), None
        done = self._already_unscaled(grads)
        if any(done):
            # Those that are replaced by their gradients never had a scale in them, which `unscale` cannot know.
            grads = [
                g
                if g is None or each != replaces_variable(v)
                else unscale(g, _reciprocal_if(each, self._state().scale))
                for g, v, each in zip(grads, variables, done, strict=True)
            ]
            scale = tf.ones([])
        if tf.distribute.has_strategy():
            grads, loss_finite = self._over_replicas(grads, variables, loss_finite, unscaled=any(done))
            scale = tf.ones([])
        replicas.on_each_device(
            lambda grads, loss_finite, scale: self._step(grads, variables, loss_finite, scale),
            (grads, loss_finite, scale),
            variables=[v for v in [*variables, *self.variables] if isinstance(v, keras.Variable)],
            optimizers=self._update.optimizers,
        )

    def minimize(self, loss: Callable[[], Any], variables: Sequence[keras.Variable]) -> tf.Tensor:
        """Takes one training step: loss, scaled gradients, update.

        Args:
            loss: called without arguments, returns the loss. It is run under a tape of its own.
            variables: what to update.

        Returns:
            The loss, unscaled.

        Example:

        >>> import keras, keras_mp
        >>> weight = keras.Variable(2.0)
        >>> optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.25))
        >>> float(optimizer.minimize(lambda: weight**2, [weight])), float(weight)
        (4.0, 1.0)
        """
        variables = list(variables)
        if not self.built:
            replicas.once_for_all_replicas(lambda: self.build(variables), variables)
        with tf.GradientTape() as tape:
            unscaled = tf.convert_to_tensor(loss())
            scaled = self.scale_loss(unscaled)
        self.apply(tape.gradient(scaled, [keras_variables.tensorflow_variable(v) for v in variables]), variables)
        return unscaled

    def finalize_variable_values(self, var_list: Sequence[keras.Variable]) -> None:
        """Lets the inner optimizer write its averages into the weights; Keras calls it at the end of `fit`.

        Args:
            var_list: the variables that were trained.

        Raises:
            LossScaleStuckError: where a step compiled by XLA got stuck and could not say so.
        """
        self._read()
        super().finalize_variable_values(var_list)

    def load_own_variables(self, store: Any) -> None:
        """Restores the state, also from a file that Keras's own wrapper wrote.

        Args:
            store: mapping from the variables' numbers, as strings, to their values.
        """
        if not self.built or len(store.keys()) != len(self.variables) - len(self._added_variables):
            super().load_own_variables(store)
            return
        own = {id(variable) for variable in self._added_variables}
        for number, variable in enumerate(v for v in self.variables if id(v) not in own):
            variable.assign(store[str(number)])
        initial = self._scaling.initial_state()
        for name, variable in self._own_state.items():
            variable.assign(getattr(initial, name))

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an optimizer like this one.

        Those that Keras's wrapper does not have are listed only where they differ from their defaults.

        Raises:
            ArgumentError: from `model.save` to a `.h5` file, which would lose the state of the inner optimizer.
        """
        if keras_files.saving_to_h5():
            raise ArgumentError(
                "A .h5 file does not keep the state of a LossScaleOptimizer: the slots of the inner optimizer and the "
                'loss scale would be lost without a word. Save to a format that keeps them: model.save("model.keras"), '
                'model.save_weights("model.weights.h5") or tf.train.Checkpoint(model=model, optimizer=optimizer). '
                "For a .h5 file without the optimizer: keras.saving.save_model(model, path, include_optimizer=False)."
            )
        config = super().get_config()
        own = {
            **dataclasses.asdict(self._scaling),
            "max_consecutive_skips": self.max_consecutive_skips,
            "jit_compile": self.jit_compile,
            "reduce_dtype": self.reduce_dtype,
            "sum_repeated_ids": self.sum_repeated_ids,
        }
        config.update({name: own[name] for name, default in _OWN_ARGUMENTS.items() if own[name] != default})
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "LossScaleOptimizer":
        """Makes an optimizer from what `get_config` returned."""
        return super().from_config(dict(config), custom_objects=custom_objects)  # it takes entries out of the dict

    def _state(self) -> LossScaleState:
        """The state as tensors, from the variables where they exist."""
        if not self.built:
            return self._scaling.initial_state()
        own = {name: tf.convert_to_tensor(variable.value) for name, variable in self._own_state.items()}
        return LossScaleState(
            scale=self._scaling.bounded(tf.convert_to_tensor(self.dynamic_scale.value)),
            finite_steps=tf.cast(self.step_counter.value, tf.int64),
            **own,
        )

    def _assign_state(self, state: LossScaleState) -> None:
        self.dynamic_scale.assign(state.scale)
        self.step_counter.assign(state.finite_steps)
        for name, variable in self._own_state.items():
            variable.assign(getattr(state, name))

    def _counts(self) -> tuple[int, int]:
        """How many steps were skipped, and how many there were."""
        if not self.built:
            return 0, 0
        skipped = int(self._state().skipped_steps)
        applied = keras_optimizers.update_count(self.inner_optimizer)
        return skipped, skipped + int(keras.ops.convert_to_numpy(applied))

    def _begin_training(self) -> None:
        self._steps_at_begin = self._counts()

    def _end_epoch(self) -> None:
        """Warns after the first epoch of a training of which most steps were skipped."""
        if self._steps_at_begin is None:
            return
        (skipped, steps), (before, steps_before) = self._counts(), self._steps_at_begin
        if steps - steps_before >= _SKIPS_OF_A_SEARCH:
            self._steps_at_begin = None
        self._warn_of_skips(skipped - before, steps - steps_before, "of the first epoch")

    def _warn_of_skips(self, skipped: int, steps: int, which: str) -> None:
        if 2 * skipped <= steps or skipped < _SKIPS_OF_A_SEARCH or self._told_of_skips:
            return
        self._told_of_skips = True
        state = self._state()
        warnings.warn(
            self._scaling.explain_skips(skipped, steps, which, float(state.scale), int(state.consecutive_skips)),
            KerasMPWarning,
            stacklevel=stacklevel(),
        )

    def _read(self) -> LossScaleState:
        """The state for a user, who is told here where the training step could not tell him that it is stuck."""
        state = self._state()
        if tf.executing_eagerly() and self.built and int(state.skipped_steps) != self._stuck_told_at:
            self._raise_if_stuck(state)
        return state

    def _variables_for(
        self, grads: list[Any], trainable_variables: Sequence[keras.Variable] | None
    ) -> list[keras.Variable]:
        if trainable_variables is None and not self.built:
            raise ValueError(
                "Without `trainable_variables` the optimizer must be built first: "
                "optimizer.build(model.trainable_variables)"
            )
        variables = list(keras_optimizers.trained_by(self) if trainable_variables is None else trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(
                f"Received {len(grads)} gradients for {len(variables)} variables; expected one for each, with None "
                "where there is none: optimizer.apply(tape.gradient(loss, variables), variables)"
            )
        if not self.built:
            replicas.once_for_all_replicas(lambda: self.build(variables), variables)
        return variables

    def _over_replicas(
        self, grads: list[Any], variables: list[keras.Variable], loss_finite: "tf.Tensor | bool", unscaled: bool
    ) -> tuple[list[Any], tf.Tensor]:
        """Unscaled gradients of the global batch, and whether the loss was finite on every replica.

        Gradients are unscaled before they are added up: the sum of scaled ones may overflow where the gradient does
        not. A value that is not finite on one replica makes the sum so on all of them.
        """
        scale = self._state().scale
        replaced = [replaces_variable(v) for v in variables]
        scaled = self.reduce_dtype == "float16"  # unscaled, it would underflow

        def prepared(gradient: Any) -> Any:
            if unscaled != scaled:  # it is as it is to be sent
                return _as_dtype(gradient, self.reduce_dtype)
            return _as_dtype(unscale(gradient, _reciprocal_if(unscaled, scale)), self.reduce_dtype)

        given = [None if g is None or over else prepared(g) for g, over in zip(grads, replaced, strict=True)]
        *sums, bad_losses = replicas.sum_over_replicas([*given, tf.where(loss_finite, 0.0, 1.0)])
        if self.reduce_dtype != "float32":
            sums = [None if s is None else unscale(s, scale if scaled else tf.ones([])) for s in sums]
        for index, (gradient, over) in enumerate(zip(grads, replaced, strict=True)):
            if over and gradient is not None:
                # The history of largest values, and a scale that grows with them: the global batch has their maximum.
                sums[index] = replicas.maximum_over_replicas(gradient)
        return sums, bad_losses == 0

    def _step(
        self,
        grads: "list[tf.Tensor | tf.IndexedSlices | None]",
        variables: list[keras.Variable],
        loss_finite: "tf.Tensor | bool",
        scale: tf.Tensor | None,
    ) -> None:
        """The whole step on one device, with the gradients of the global batch."""
        state = self._state()
        scale = state.scale if scale is None else scale
        squares = sum_of_squares(grads) if self._update.clips_globally else None
        finite = all_finite(grads, finite_witness(grads) if squares is None else squares)
        tf.cond(finite, lambda: self._update(grads, variables, scale, squares), lambda: None)
        state = self._scaling.update(state, finite, loss_finite)
        self._assign_state(state)
        self._raise_if_stuck(state)
        self._warn_if_most_are_skipped(state)

    def _already_unscaled(self, grads: list[Any]) -> list[bool]:
        """Which gradients were made of what `unscale` returned. Warns of those that were clipped without it."""
        tensors = [g.values if isinstance(g, tf.IndexedSlices) else g for g in grads]
        given = self._unscaled_from.pop(threading.get_ident(), None)
        if tf.executing_eagerly():
            if given is not None:
                return [g is not None and all(g is not each for each in given) for g in grads]
            if self._unscaled_in_graph:
                self._unscaled_in_graph = False
                warnings.warn(_UNSCALED_ELSEWHERE.format("outside of it"), KerasMPWarning, stacklevel=stacklevel())
            return [False] * len(grads)
        in_graph = [t for t in tensors if hasattr(t, "graph")]
        if not self._unscale_was_used:
            clipped = next(filter(None, (provenance.clipped_by(t, self._marks) for t in in_graph)), None)
            if clipped:
                warnings.warn(_CLIPPED_SCALED.format(clipped=clipped), KerasMPWarning, stacklevel=stacklevel())
            return [False] * len(grads)
        marks = iter(self._marks.found(in_graph))
        found = [next(marks) if hasattr(t, "graph") else frozenset() for t in tensors]
        if any(len(each) > 1 for each in found):
            raise ArgumentError(
                "apply() received a gradient that was made of scaled gradients as well as of such as `unscale` "
                "returned, so that it is neither. Unscale first, and compute with nothing but what it returned: "
                "gradients = optimizer.unscale(gradients)"
            )
        unscaled = any(provenance.UNSCALED in each for each in found)
        if unscaled:
            self._unscaled_in_graph = False
        elif given is not None and not any(found):
            warnings.warn(_UNSCALED_ELSEWHERE.format("in another one"), KerasMPWarning, stacklevel=stacklevel())
        clipped = next(filter(None, (provenance.clipped_by(t, self._marks) for t in in_graph)), None)
        if clipped:
            warnings.warn(_CLIPPED_SCALED.format(clipped=clipped), KerasMPWarning, stacklevel=stacklevel())
        # What was made of neither, such as zeros in place of a gradient, goes along with the others.
        return [
            unscaled and g is not None and provenance.SCALED not in each for g, each in zip(grads, found, strict=True)
        ]

    def _losses_seen(self) -> list[tf.Tensor]:
        """Whether each loss since the last `apply` was finite, of those that can be used here."""
        seen = self._loss_finite.pop(threading.get_ident(), [])
        if tf.executing_eagerly():
            seen = [each for each in seen if hasattr(each, "numpy")]
            return [tf.reduce_all(tf.stack(seen))] if seen else []
        graphs, graph = [], tf.compat.v1.get_default_graph()
        while graph is not None:
            graphs.append(graph)
            graph = getattr(graph, "outer_graph", None)
        return [each for each in seen if not hasattr(each, "numpy") and any(each.graph is one for one in graphs)]

    def _take_loss_finite(self) -> "tf.Tensor | bool":
        """Whether all losses that `scale_loss` saw in this step were finite; True where that cannot be known."""
        seen = self._losses_seen()
        return tf.reduce_all(tf.stack(seen)) if seen else True

    def _warn_if_most_are_skipped(self, state: LossScaleState) -> None:
        """Warns after so many steps of a loop that has no epochs, where most were skipped."""
        if self._told_of_skips or self._steps_at_begin is not None or execution.in_xla_context():
            return
        steps = state.skipped_steps + tf.cast(keras_optimizers.update_count(self.inner_optimizer).value, tf.int64)
        told = (steps == _STEPS_TO_JUDGE_BY) & (2 * state.skipped_steps > steps)

        def warn(skipped: Any, steps: Any) -> None:
            self._warn_of_skips(int(skipped), int(steps), "so far")

        if tf.executing_eagerly():
            if told:
                warn(state.skipped_steps, steps)
        else:
            tf.cond(told, lambda: tf.py_function(warn, [state.skipped_steps, steps], []), tf.no_op)

    def _raise_if_stuck(self, state: LossScaleState) -> None:
        def make_error(scale: float, skipped: int, consecutive: int, nonfinite_losses: int) -> LossScaleStuckError:
            self._stuck_told_at = int(skipped)
            return LossScaleStuckError(
                self._scaling.explain_stuck(float(scale), int(consecutive), int(nonfinite_losses))
            )

        facts = [state.scale, state.skipped_steps, state.consecutive_skips, state.nonfinite_losses]
        stuck = state.consecutive_skips >= self.max_consecutive_skips
        if tf.executing_eagerly():
            if stuck:
                raise make_error(*(fact.numpy() for fact in facts))
        elif not execution.in_xla_context():
            tf.cond(stuck, lambda: graph_errors.raise_from_graph(make_error, facts), tf.no_op)


def _optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Those that train a model: beside optimizers of the user's, not the one that `compile` was called without."""
    held = [value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)]
    compiled = getattr(model, "optimizer", None)
    others = [optimizer for optimizer in held if optimizer is not compiled]
    return others or ([] if compiled is None else [compiled])


def _reciprocal_if(condition: bool, scale: tf.Tensor) -> tf.Tensor:
    return tf.math.reciprocal(scale) if condition else scale


def _as_dtype(gradient: "tf.Tensor | tf.IndexedSlices", dtype: str) -> "tf.Tensor | tf.IndexedSlices":
    if dtype == "float32":
        return gradient
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype)


def _as_optimizer(optimizer: Any) -> keras.optimizers.Optimizer:
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


def _warn_of_unscaled_gradients(model: keras.Model) -> None:
    """Warns of a model that computes in float16 and is about to be trained by an optimizer without our loss scale."""
    bare = [each for each in _optimizers_of(model) if not isinstance(each, LossScaleOptimizer)]
    if not bare or not needs_loss_scaling(model):
        return
    wrapped = isinstance(bare[0], keras.optimizers.LossScaleOptimizer)
    name = type(bare[0].inner_optimizer if wrapped else bare[0]).__name__
    trouble = (
        "Keras's LossScaleOptimizer lets its scale run away in long trainings and replicas disagree on skipped steps"
        if wrapped
        else "its optimizer scales no loss, so that small gradients become zero"
    )
    warnings.warn(
        f"Model {model.name!r} computes in float16, and {trouble}. Write "
        f"model.compile(keras_mp.LossScaleOptimizer(keras.optimizers.{name}(...)), ...).",
        KerasMPWarning,
        stacklevel=stacklevel(),
    )


def _begin_training(model: keras.Model) -> None:
    for each in _optimizers_of(model):
        if isinstance(each, LossScaleOptimizer):
            each._begin_training()


def _end_epoch(model: keras.Model) -> None:
    for each in _optimizers_of(model):
        if isinstance(each, LossScaleOptimizer):
            each._end_epoch()


keras_hooks.call_before_training(_warn_of_unscaled_gradients)
keras_hooks.call_around_epochs(_begin_training, _end_epoch)
