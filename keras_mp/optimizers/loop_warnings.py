"""What users are told of a training loop: that nobody scales gradients, or that most or all steps are skipped."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import execution, graph_errors, keras_hooks, keras_optimizers
from keras_mp.errors import KerasMPWarning, LossScaleStuckError
from keras_mp.optimizers.loss_scale import LossScaleState, LossScaling
from keras_mp.policies.policy import needs_loss_scaling, stacklevel

__all__ = ["SkippedSteps", "watch"]

# So many skipped steps at the start of a training are how a scale is found that fits, and no sign of trouble.
_SKIPS_OF_A_SEARCH = 3
# A loop of one's own has no epochs, after the first of which to say that most steps were skipped.
_STEPS_TO_JUDGE_BY = 100


class SkippedSteps:
    """Tells the user, once for each optimizer, that most of its steps were skipped, or that it is stuck.

    Args:
        scaling: the rules of the optimizer's scale, which explain the skips.

    Attributes:
        stuck_told_at: how many steps had been skipped when the error was raised last; 0 before.
    """

    def __init__(self, scaling: LossScaling) -> None:
        self._scaling = scaling
        self._steps_at_begin: tuple[int, int] | None = None
        self._told = False
        self.stuck_told_at = 0

    def begin_training(self, skipped: int, steps: int) -> None:
        """Remembers how many steps were skipped, and how many there were, before the first epoch."""
        self._steps_at_begin = skipped, steps

    def end_epoch(self, counts: Callable[[], tuple[int, int]], state: Callable[[], LossScaleState]) -> None:
        """Warns after the first epoch of a training of which most steps were skipped.

        Args:
            counts: reads how many steps were skipped, and how many there were.
            state: reads the state of the scale.
        """
        if self._steps_at_begin is None:
            return
        (skipped, steps), (before, steps_before) = counts(), self._steps_at_begin
        if steps - steps_before >= _SKIPS_OF_A_SEARCH:
            self._steps_at_begin = None
        self._warn(skipped - before, steps - steps_before, "of the first epoch", state)

    def after_step(
        self, state: LossScaleState, inner: keras.optimizers.Optimizer, read: Callable[[], LossScaleState]
    ) -> None:
        """Warns after so many steps of a loop that has no epochs, where most were skipped.

        Args:
            state: of the scale, after the step.
            inner: the optimizer that counts the steps that were not skipped.
            read: reads the state of the scale.
        """
        if self._told or self._steps_at_begin is not None or execution.in_xla_context():
            return
        steps = state.skipped_steps + tf.cast(keras_optimizers.update_count(inner).value, tf.int64)
        told = (steps == _STEPS_TO_JUDGE_BY) & (2 * state.skipped_steps > steps)

        def warn(skipped: Any, steps: Any) -> None:
            self._warn(int(skipped), int(steps), "so far", read)

        if tf.executing_eagerly():
            if told:
                warn(state.skipped_steps, steps)
        else:
            tf.cond(told, lambda: tf.py_function(warn, [state.skipped_steps, steps], []), tf.no_op)

    def _warn(self, skipped: int, steps: int, which: str, read: Callable[[], LossScaleState]) -> None:
        if 2 * skipped <= steps or skipped < _SKIPS_OF_A_SEARCH or self._told:
            return
        self._told = True
        state = read()
        warnings.warn(
            self._scaling.explain_skips(skipped, steps, which, float(state.scale), int(state.consecutive_skips)),
            KerasMPWarning,
            stacklevel=stacklevel(),
        )

    def raise_if_stuck(self, state: LossScaleState, limit: int) -> None:
        """Raises an error where so many steps in a row were skipped; in a graph, when it runs.

        Args:
            state: of the scale.
            limit: so many.
        """

        def make_error(scale: float, skipped: int, consecutive: int, nonfinite_losses: int) -> LossScaleStuckError:
            self.stuck_told_at = int(skipped)
            return LossScaleStuckError(
                self._scaling.explain_stuck(float(scale), int(consecutive), int(nonfinite_losses))
            )

        facts = [state.scale, state.skipped_steps, state.consecutive_skips, state.nonfinite_losses]
        stuck = state.consecutive_skips >= limit
        if tf.executing_eagerly():
            if stuck:
                raise make_error(*(fact.numpy() for fact in facts))
        elif not execution.in_xla_context():
            tf.cond(stuck, lambda: graph_errors.raise_from_graph(make_error, facts), tf.no_op)


def watch(kind: type, begin: Callable[[Any], None], end_epoch: Callable[[Any], None]) -> None:
    """Has models looked at before they are trained, and their optimizers called around epochs.

    Args:
        kind: the class of optimizers that scale their loss; models that need one and have none are warned of.
        begin: called with each optimizer of that class at the start of a training.
        end_epoch: called with it at the end of each epoch.
    """

    def for_each(call: Callable[[Any], None], model: keras.Model) -> None:
        for each in _optimizers_of(model):
            if isinstance(each, kind):
                call(each)

    keras_hooks.call_before_training(lambda model: _warn_of_unscaled_gradients(model, kind))
    keras_hooks.call_around_epochs(lambda model: for_each(begin, model), lambda model: for_each(end_epoch, model))


def _optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """Those that train a model: beside optimizers of the user's, not the one that `compile` was called without."""
    held = [value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)]
    compiled = getattr(model, "optimizer", None)
    others = [optimizer for optimizer in held if optimizer is not compiled]
    return others or ([] if compiled is None else [compiled])


def _warn_of_unscaled_gradients(model: keras.Model, kind: type) -> None:
    """Warns of a model that computes in float16 and is about to be trained by an optimizer without our loss scale."""
    bare = [each for each in _optimizers_of(model) if not isinstance(each, kind)]
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
