"""The update of the weights by an optimizer that scales no loss: gradients unscaled, clipped and applied in one go."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_mp._compat import execution, keras_optimizers, keras_variables
from keras_mp.errors import ArgumentError
from keras_mp.optimizers import half_variables, tf_kernels
from keras_mp.optimizers.loss_scale import global_norm, sum_of_squares

__all__ = ["WeightUpdate", "replaces_variable", "unscale"]

# Fewer weights gain less than the compiler takes, and small variables gain nothing: handing each to the compiled
# function takes as long as a few ops on it.
_WORTH_COMPILING = 1_000_000
_WORTH_COMPILING_EACH = 2_000
_LARGE_NORM = 2.0**60


_Gradients: TypeAlias = "Sequence[tf.Tensor | tf.IndexedSlices | None]"


class WeightUpdate:
    """Applies an optimizer to gradients of a scaled loss on one device, by `tf_kernels` or compiled by XLA.

    Compiled, one pass over the weights does what takes one for each operation otherwise. Only the update is compiled:
    what comes before it may hold anything.

    Args:
        optimizer: the optimizer without loss scaling.
        jit_compile: True; False, for Keras's operations one by one, with their rounding; or "auto", which takes kernels
            of TensorFlow where it has them, and else compiles where that pays and cannot fail.
        sum_repeated_ids: whether gradients of a row that comes several times are added up before an optimizer squares
            them. Else Keras's optimizers get sparse gradients as they are, and add up their squares.

    Raises:
        ArgumentError: for another `jit_compile`.
    """

    def __init__(
        self, optimizer: keras.optimizers.Optimizer, jit_compile: "bool | str", sum_repeated_ids: bool = False
    ) -> None:
        if jit_compile not in (True, False, "auto"):
            raise ArgumentError(f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile!r}')
        self.jit_compile, self.sum_repeated_ids = jit_compile, sum_repeated_ids
        self._optimizer = optimizer
        self._why_not = "no step has been taken yet"
        self._compiled: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._learning_rates: list[Any] = []

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """The optimizer, and those that it hands its variables to if it is one of several."""
        return [self._optimizer, *getattr(self._optimizer, "optimizers", [])]

    @property
    def _parts(self) -> list[keras.optimizers.Optimizer]:
        """Those that update variables themselves."""
        return self.optimizers[1:] or [self._optimizer]

    @property
    def reason(self) -> str:
        """Whether the update is compiled, and if not, why, as was decided for the latest step that was traced."""
        return f"not compiled: {self._why_not}" if self._why_not else "compiled"

    @property
    def clips_globally(self) -> bool:
        """Whether the norm of all gradients is limited in this step, and not that of a sum which is complete later."""
        limit = self._optimizer.global_clipnorm
        return limit is not None and limit > 0 and not self._optimizer.gradient_accumulation_steps

    def __call__(
        self,
        grads: _Gradients,
        variables: Sequence[keras.Variable],
        scale: tf.Tensor,
        squares: tf.Tensor | None = None,
    ) -> None:
        """Updates the variables.

        Args:
            grads: one for each variable, all finite, multiplied by `scale`.
            variables: what to update.
            scale: scalar.
            squares: scalar, the `sum_of_squares` of `grads` where the update `clips_globally`.
        """
        norm = self._norm(grads, variables, squares)
        update_rows = self._row_update(grads, variables)
        if update_rows is None:
            self._update(self._merged(grads, variables), variables, scale, norm)
            return
        learning_rate = tf.identity(self._optimizer.learning_rate)  # before the update counts its iterations
        pairs = list(zip(grads, variables, strict=True))
        sparse = [(g, v) for g, v in pairs if isinstance(g, tf.IndexedSlices)]
        dense = [(g, v) for g, v in pairs if not isinstance(g, tf.IndexedSlices)]
        if any(g is not None for g, _ in dense):
            self._update([g for g, _ in dense], [v for _, v in dense], scale, norm)
        else:
            self._optimizer.iterations.assign_add(1)
        unscaled = self._unscaling(scale, norm)
        for gradient, variable in sparse:
            there = keras_variables.tensorflow_variable(variable)
            written = keras_variables.Float32View(there, self._optimizer) if half_variables.is_narrow(there) else there
            update_rows(self._optimizer, unscaled(gradient, variable), written, learning_rate, self._sums_repeated_ids)

    def _norm(
        self, grads: _Gradients, variables: Sequence[keras.Variable], squares: tf.Tensor | None
    ) -> tf.Tensor | None:
        """The norm of all gradients, where it is limited."""
        if squares is None:
            return None
        counted = [None if replaces_variable(v) else g for g, v in zip(grads, variables, strict=True)]
        if any(map(replaces_variable, variables)):
            squares = sum_of_squares(counted)  # else the gradients are not read once more for their norm
        return global_norm(counted, squares)

    def _update(
        self,
        grads: _Gradients,
        variables: Sequence[keras.Variable],
        scale: tf.Tensor,
        norm: tf.Tensor | None,
    ) -> None:
        """Hands the gradients to the optimizer, in a function that XLA compiles where that pays."""
        self._why_not = self._why_not_compiled(grads, variables)
        if self._why_not:
            self._apply(grads, variables, scale, norm)
            return
        # Python values are constants in the compiled program, and variables are those of one device.
        optimizer = self._optimizer
        learning_rate = keras_optimizers.learning_rate_source(optimizer)
        key = (
            *(id(keras_variables.tensorflow_variable(v)) for v in variables),
            *(optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue, optimizer.weight_decay),
            id(learning_rate),
        )
        if key not in self._compiled:
            self._learning_rates.append(learning_rate)  # one that is gone would leave its id to another
            self._compiled[key] = tf.function(
                lambda grads, scale, norm: self._apply(grads, variables, scale, norm),
                jit_compile=True,
                autograph=False,
                reduce_retracing=True,
            )
        self._compiled[key](grads, scale, norm)

    def _apply(
        self,
        grads: _Gradients,
        variables: Sequence[keras.Variable],
        scale: tf.Tensor,
        norm: tf.Tensor | None,
    ) -> None:
        optimizer, limit = self._optimizer, self._optimizer.global_clipnorm
        unscaled = self._unscaling(scale, norm)
        by_kernels, sums = self._uses_kernels(), self._sums_repeated_ids
        later = by_kernels and not self._works_on_gradients(norm)
        if not later:
            grads = [g if g is None else unscaled(g, v) for g, v in zip(grads, variables, strict=True)]
            if any(each.gradient_accumulation_steps for each in self.optimizers):
                grads = [_as_accumulated(g, v) for g, v in zip(grads, variables, strict=True)]
        prepared = unscaled if later else lambda gradient, _: gradient
        try:
            optimizer.global_clipnorm = limit if norm is None else None
            with contextlib.ExitStack() as stack:
                stack.enter_context(half_variables.in_float32(self._parts, variables))
                if by_kernels:
                    stack.enter_context(tf_kernels.by_kernels(optimizer, prepared, sums))
                optimizer.apply(grads, variables)
        finally:
            optimizer.global_clipnorm = limit

    def _works_on_gradients(self, norm: tf.Tensor | None) -> bool:
        """Whether Keras does more with gradients than hand each to its variable's update, so that they are unscaled
        before.
        """
        return any(
            each.clipnorm
            or each.clipvalue
            or (each.global_clipnorm and (norm is None or each is not self._optimizer))
            or each.gradient_accumulation_steps
            or each.loss_scale_factor
            for each in self.optimizers
        )

    def _unscaling(self, scale: tf.Tensor, norm: tf.Tensor | None) -> "Callable[[Any, Any], Any]":
        """From a gradient and its variable to that of the loss itself, with the norm of all limited."""
        factor, shrinks = tf.math.reciprocal(scale), None
        if norm is not None:
            # In two steps: a limit over a norm near float32's end is a subnormal number, which a CPU takes for zero.
            norm = unscale(norm, scale)
            first = tf.minimum(_LARGE_NORM / norm, 1.0)
            shrinks = tf.minimum(self._optimizer.global_clipnorm / (norm * first), 1.0 / first)
            factor *= tf.cast(first, factor.dtype)

        def unscaled(gradient: Any, variable: Any) -> Any:
            if replaces_variable(variable):
                return gradient
            gradient = _multiply(gradient, factor)
            return gradient if shrinks is None else _multiply(gradient, shrinks)

        return unscaled

    def _row_update(self, grads: _Gradients, variables: Sequence[keras.Variable]) -> "Callable[..., None] | None":
        """What updates the rows of sparse gradients alone, if there are any and others would stay as they are."""
        sparse = [v for g, v in zip(grads, variables, strict=True) if isinstance(g, tf.IndexedSlices)]
        # How many rows there are without their repetitions is nothing that XLA can know.
        if not sparse or getattr(self._optimizer, "momentum", None) or execution.in_xla_context():
            return None
        return None if self._touches_all(sparse) else _ROW_UPDATES.get(type(self._optimizer))

    def _touches_all(self, sparse: Sequence[keras.Variable]) -> bool:
        """Whether more is done to variables with sparse gradients than what the optimizer's method itself does."""
        optimizer = self._optimizer
        return bool(
            optimizer.clipnorm
            or optimizer.clipvalue
            or optimizer.weight_decay
            or optimizer.use_ema
            or optimizer.gradient_accumulation_steps
            or any(getattr(v, "constraint", None) is not None for v in sparse)
        )

    @property
    def _sums_repeated_ids(self) -> bool:
        """Whether it was asked for, or Keras does so itself, to accumulate gradients or limit the norm of all."""
        accumulates = any(each.gradient_accumulation_steps for each in self.optimizers)
        return bool(self.sum_repeated_ids or accumulates or self._optimizer.global_clipnorm)

    def _merged(self, grads: _Gradients, variables: Sequence[keras.Variable]) -> _Gradients:
        """The gradients, those that are sparse as tensors where their rows are to be added up before all else.

        Kernels get them as they are and make tensors of one after the other.
        """
        optimizer = self._optimizer
        if not self._sums_repeated_ids:
            return list(grads)
        if not type(optimizer).__module__.startswith("keras.") or tf_kernels.keeps_rows(optimizer):
            return list(grads)
        sparse = [v for g, v in zip(grads, variables, strict=True) if isinstance(g, tf.IndexedSlices)]
        if self._uses_kernels() and not self._touches_all(sparse):
            return list(grads)
        # All from one graph, as Keras's sum over replicas wants them: that of the condition which this is a branch of.
        return [
            g if g is None else tf_kernels.dense(g) if isinstance(g, tf.IndexedSlices) else tf.identity(g)
            for g in grads
        ]

    def _uses_kernels(self) -> bool:
        return self.jit_compile == "auto" and not execution.in_xla_context() and tf_kernels.has_kernel(self._optimizer)

    def _why_not_compiled(self, grads: Sequence[Any], variables: Sequence[keras.Variable]) -> str:
        """Why XLA does not compile the update of these weights; empty if it does."""
        if not self.jit_compile:
            return "jit_compile=False"
        if execution.in_xla_context():
            return "XLA compiles the whole step already"
        if self._uses_kernels():
            name = type(self._optimizer).__name__
            return f"TensorFlow has a kernel for what {name} does to a variable, as fast as what XLA makes of it"
        if any(isinstance(g, tf.IndexedSlices) for g in grads):
            return "there are sparse gradients, and XLA would compile anew for every number of rows"
        if self.jit_compile == "auto":
            parts = [*self.optimizers, keras_optimizers.learning_rate_source(self._optimizer)]
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


def _descend_rows(
    optimizer: Any, gradient: tf.IndexedSlices, variable: Any, learning_rate: tf.Tensor, sum_repeated_ids: bool
) -> None:
    """Plain gradient descent, which leaves other rows as they are and squares nothing."""
    optimizer.assign_sub(variable, _multiply(gradient, learning_rate))


def _adagrad_rows(
    optimizer: Any, gradient: tf.IndexedSlices, variable: Any, learning_rate: tf.Tensor, sum_repeated_ids: bool
) -> None:
    """Adagrad, which leaves rows without a gradient as they are: Duchi, Hazan and Singer, 2011, section 1.3."""
    rows, places = tf.unique(gradient.indices)
    given = tf.cast(gradient.values, variable.dtype)
    values = tf.math.unsorted_segment_sum(given, places, tf.size(rows))
    squares = tf.square(values)
    if not sum_repeated_ids:
        squares = tf.math.unsorted_segment_sum(tf.square(given), places, tf.size(rows))
    sums = keras_optimizers.slot_of(optimizer, "accumulators", variable)
    of_rows = tf.gather(keras_variables.tensorflow_variable(sums), rows) + squares
    optimizer.assign(sums, tf.IndexedSlices(of_rows, rows, gradient.dense_shape))
    steps = tf.cast(learning_rate, values.dtype) * values / tf.sqrt(of_rows + optimizer.epsilon)
    optimizer.assign_sub(variable, tf.IndexedSlices(steps, rows, gradient.dense_shape))


_ROW_UPDATES: dict[type, Callable[..., None]] = {
    keras.optimizers.SGD: _descend_rows,
    keras.optimizers.Adagrad: _adagrad_rows,
}


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


def _as_accumulated(gradient: Any, variable: Any) -> Any:
    """A gradient in the dtype in which Keras adds up gradients: that of its variable, or float32 for 16 bits."""
    if gradient is None or half_variables.is_narrow(variable):
        return gradient
    return tf.cast(gradient, keras_variables.tensorflow_variable(variable).dtype)


def replaces_variable(variable: Any) -> bool:
    """Whether the variable takes its gradient's value for its own, as the scale of a float8 tensor does.

    Such a gradient never had the loss in it, so it is not divided by the loss scale.
    """
    return bool(getattr(variable, "overwrite_with_gradient", False))
