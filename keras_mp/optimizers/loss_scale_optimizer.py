"""`LossScaleOptimizer`: Keras's wrapper of that name, with a loss scale that cannot run away or fall silent."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_optimizers, keras_variables, patches
from keras_mp.distribution import replicas
from keras_mp.errors import KerasMPWarning
from keras_mp.optimizers import global_batch, half_variables, loop_warnings, scaled_step, wrapper_arguments
from keras_mp.optimizers.loss_scale import LossScaleState, LossScaling, all_finite, finite_witness, sum_of_squares
from keras_mp.optimizers.weight_update import WeightUpdate, replaces_variable, unscale

__all__ = ["LossScaleOptimizer"]

_OWN_STATE = ("hysteresis_left", "skipped_steps", "consecutive_skips", "nonfinite_losses")


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
        wrapper_arguments.refuse_those_of_inner(kwargs)
        inner_optimizer = wrapper_arguments.as_optimizer(inner_optimizer)
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
        wrapper_arguments.check(max_consecutive_skips, reduce_dtype, sum_repeated_ids)
        super().__init__(
            inner_optimizer, initial_scale=initial_scale, dynamic_growth_steps=dynamic_growth_steps, name=name, **kwargs
        )
        self.max_consecutive_skips = max_consecutive_skips
        self.reduce_dtype = reduce_dtype
        self._scaling = scaling
        self._update = WeightUpdate(inner_optimizer, jit_compile, sum_repeated_ids)
        self._so_far = scaled_step.ScaledStep()
        self._skips = loop_warnings.SkippedSteps(scaling)

    @property
    def loss_scale(self) -> tf.Tensor:
        """The factor that the next loss is multiplied by, a float32 scalar tensor."""
        self._so_far.scale_was_used = True
        return self._so_far.marked(self._read().scale)

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
        self._so_far.scale_was_used = True
        loss = tf.convert_to_tensor(loss)
        loss = tf.cast(loss, tf.float64 if loss.dtype == tf.float64 else tf.float32)
        self._so_far.saw_loss(loss)
        return loss * tf.cast(self._so_far.marked(self._state().scale), loss.dtype)

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
        return self._so_far.unscale(gradients, self._state().scale)

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
        if not self._so_far.scale_was_used:
            self._so_far.scale_was_used = True
            warnings.warn(scaled_step.UNSCALED_LOSS, KerasMPWarning, stacklevel=3)
        loss_finite, scale = self._so_far.take_loss_finite(), None
        done = self._so_far.already_unscaled(grads)
        if any(done):
            # Those that are replaced by their gradients never had a scale in them, which `unscale` cannot know.
            grads = [
                g
                if g is None or each != replaces_variable(v)
                else unscale(g, global_batch.reciprocal_if(each, self._state().scale))
                for g, v, each in zip(grads, variables, done, strict=True)
            ]
            scale = tf.ones([])
        if tf.distribute.has_strategy():
            grads, loss_finite = global_batch.over_replicas(
                grads, variables, loss_finite, self._state().scale, unscaled=any(done), reduce_dtype=self.reduce_dtype
            )
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
        wrapper_arguments.refuse_h5()
        config = super().get_config()
        own = {
            **dataclasses.asdict(self._scaling),
            "max_consecutive_skips": self.max_consecutive_skips,
            "jit_compile": self.jit_compile,
            "reduce_dtype": self.reduce_dtype,
            "sum_repeated_ids": self.sum_repeated_ids,
        }
        config.update(wrapper_arguments.not_default(own))
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
        self._skips.begin_training(*self._counts())

    def _end_epoch(self) -> None:
        self._skips.end_epoch(self._counts, self._state)

    def _read(self) -> LossScaleState:
        """The state for a user, who is told here where the training step could not tell him that it is stuck."""
        state = self._state()
        if tf.executing_eagerly() and self.built and int(state.skipped_steps) != self._skips.stuck_told_at:
            self._skips.raise_if_stuck(state, self.max_consecutive_skips)
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
        self._skips.raise_if_stuck(state, self.max_consecutive_skips)
        self._skips.after_step(state, self.inner_optimizer, self._state)


loop_warnings.watch(
    LossScaleOptimizer, begin=LossScaleOptimizer._begin_training, end_epoch=LossScaleOptimizer._end_epoch
)
