"""The update of the weights by an optimizer that scales no loss: gradients unscaled, clipped and applied in one go."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp import backend
from keras_mp.errors import ArgumentError
from keras_mp.loss_scale import global_norm, sum_of_squares

__all__ = ["WeightUpdate", "replaces_variable", "tensorflow_variable", "unscale"]

# Fewer weights gain less than the compiler takes, and small variables gain nothing: handing each to the compiled
# function takes as long as a few ops on it.
_WORTH_COMPILING = 1_000_000
_WORTH_COMPILING_EACH = 2_000


class WeightUpdate:
    """Applies an optimizer to gradients of a scaled loss on one device, compiled by XLA where it pays.

    Compiled, one pass over the weights does what takes one for each operation otherwise. Only the update is compiled:
    what comes before it may hold anything.

    Args:
        optimizer: the optimizer without loss scaling.
        jit_compile: True, False, or "auto", which compiles where it pays and cannot fail.

    Raises:
        ArgumentError: for another `jit_compile`.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, jit_compile: "bool | str") -> None:
        if jit_compile not in (True, False, "auto"):
            raise ArgumentError(f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile!r}')
        self.jit_compile = jit_compile
        self._optimizer = optimizer
        self._why_not = "no step has been taken yet"
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._learning_rates: list[Any] = []

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """The optimizer, and those that it hands its variables to if it is one of several."""
        return [self._optimizer, *getattr(self._optimizer, "optimizers", [])]

    @property
    def reason(self) -> str:
        """Whether the update is compiled, and if not, why, as was decided for the latest step that was traced."""
        return f"not compiled: {self._why_not}" if self._why_not else "compiled"

    def __call__(
        self,
        grads: "Sequence[tf.Tensor | tf.IndexedSlices | None]",
        variables: Sequence[keras.Variable],
        scale: tf.Tensor,
        squares: tf.Tensor,
    ) -> None:
        """Updates the variables.

        Args:
            grads: one for each variable, all finite, multiplied by `scale`.
            variables: what to update.
            scale: scalar.
            squares: scalar, the `sum_of_squares` of `grads`.
        """
        norm = None
        if self._clips():
            counted = [None if replaces_variable(v) else g for g, v in zip(grads, variables, strict=True)]
            if any(map(replaces_variable, variables)):
                squares = sum_of_squares(counted)  # else the gradients are not read once more for their norm
            norm = global_norm(counted, squares)
        self._why_not = self._why_not_compiled(grads, variables)
        if self._why_not:
            self._apply(grads, variables, scale, norm)
            return
        # Python values are constants in the compiled program, and variables are those of one device.
        optimizer = self._optimizer
        key = (
            *(id(tensorflow_variable(v)) for v in variables),
            *(optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue, optimizer.weight_decay),
            id(optimizer._learning_rate),
        )
        if key not in self._compiled:
            self._learning_rates.append(optimizer._learning_rate)  # one that is gone would leave its id to another
            self._compiled[key] = tf.function(
                lambda grads, scale, norm: self._apply(grads, variables, scale, norm),
                jit_compile=True,
                autograph=False,
                reduce_retracing=True,
            )
        self._compiled[key](grads, scale, norm)

    def _apply(
        self,
        grads: "Sequence[tf.Tensor | tf.IndexedSlices | None]",
        variables: Sequence[keras.Variable],
        scale: tf.Tensor,
        norm: tf.Tensor | None,
    ) -> None:
        optimizer, limit = self._optimizer, self._optimizer.global_clipnorm
        unscaled = [
            g if g is None or replaces_variable(v) else unscale(g, scale) for g, v in zip(grads, variables, strict=True)
        ]
        if norm is not None:
            shrinks = tf.minimum(limit / unscale(norm, scale), 1.0)
            unscaled = [
                g if g is None or replaces_variable(v) else _multiply(g, shrinks)
                for g, v in zip(unscaled, variables, strict=True)
            ]
        try:
            optimizer.global_clipnorm = limit if norm is None else None
            optimizer.apply(unscaled, variables)
        finally:
            optimizer.global_clipnorm = limit

    def _clips(self) -> bool:
        """Whether the norm of all gradients is limited in this step, and not that of a sum which is complete later."""
        limit = self._optimizer.global_clipnorm
        return limit is not None and limit > 0 and not self._optimizer.gradient_accumulation_steps

    def _why_not_compiled(self, grads: Sequence[Any], variables: Sequence[keras.Variable]) -> str:
        """Why XLA does not compile the update of these weights; empty if it does."""
        if not self.jit_compile:
            return "jit_compile=False"
        if backend.in_xla_context():
            return "XLA compiles the whole step already"
        if any(isinstance(g, tf.IndexedSlices) for g in grads):
            return "there are sparse gradients, and XLA would compile anew for every number of rows"
        if self.jit_compile == "auto":
            parts = [*self.optimizers, self._optimizer._learning_rate]
            parts += [v.constraint for v in variables if getattr(v, "constraint", None) is not None]
            foreign = [part for part in parts if not type(part).__module__.startswith(("keras.", "tensorflow."))]
            if foreign:
                name = type(foreign[0]).__name__
                return f"{name} is not Keras's, and XLA may not be able to compile it; jit_compile=True tries"
            weights = sum(math.prod(v.shape) for v in variables)
            if weights < max(_WORTH_COMPILING, _WORTH_COMPILING_EACH * len(variables)):
                return (
                    f"{weights} weights in {len(variables)} variables are too few to gain by it; jit_compile=True "
                    "compiles them all the same"
                )
        return ""


def unscale(gradient: "tf.Tensor | tf.IndexedSlices", scale: tf.Tensor) -> "tf.Tensor | tf.IndexedSlices":
    """Divides a gradient by the loss scale in float32, where the quotient of a float16 one does not underflow.

    It is multiplied by the reciprocal, which is exact for powers of two and cheaper than a division.

    Args:
        gradient: of any float dtype and shape; `tf.IndexedSlices` stay sparse.
        scale: scalar.

    Returns:
        The quotient, float32 (float64 where the gradient is).
    """
    return _multiply(gradient, tf.math.reciprocal(scale))


def _multiply(gradient: "tf.Tensor | tf.IndexedSlices", factor: tf.Tensor) -> "tf.Tensor | tf.IndexedSlices":
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(_multiply(gradient.values, factor), gradient.indices, gradient.dense_shape)
    gradient = tf.convert_to_tensor(gradient)
    if gradient.dtype.size < 4:
        gradient = tf.cast(gradient, tf.float32)
    return gradient * tf.cast(factor, gradient.dtype)


def replaces_variable(variable: Any) -> bool:
    """Whether the variable takes its gradient's value for its own, as the scale of a float8 tensor does.

    Such a gradient never had the loss in it, so it is not divided by the loss scale.
    """
    return bool(getattr(variable, "overwrite_with_gradient", False))


def tensorflow_variable(variable: Any) -> tf.Variable:
    """What holds the value of a Keras variable; a TensorFlow variable is its own."""
    return variable.value if isinstance(variable, keras.Variable) else variable
