"""The loss-scale state machine: pure functions of tensors, with no Keras and no variables.

The rules are those of Micikevicius et al., "Mixed Precision Training" (https://arxiv.org/abs/1710.03740), section 3.2,
with a floor, a ceiling and a hysteresis budget. `LossScaleOptimizer` keeps the state in variables.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_mp.errors import ArgumentError

__all__ = ["LossScaleState", "LossScaling", "all_finite", "finite_witness", "global_norm", "sum_of_squares"]


class LossScaleState(NamedTuple):
    """What the state machine remembers between two steps, all scalar tensors.

    Attributes:
        scale: float32, the factor that the next loss is multiplied by.
        finite_steps: int64, steps with finite gradients since the scale last changed or a step was skipped.
        hysteresis_left: int64, how many more non-finite steps the scale bears before it backs off.
        skipped_steps: int64, steps skipped since the start.
        consecutive_skips: int64, steps skipped since the last one with finite gradients.
        nonfinite_losses: int64, how many of the `consecutive_skips` had a loss that was itself not finite.
    """

    scale: tf.Tensor
    finite_steps: tf.Tensor
    hysteresis_left: tf.Tensor
    skipped_steps: tf.Tensor
    consecutive_skips: tf.Tensor
    nonfinite_losses: tf.Tensor


@dataclasses.dataclass(frozen=True)
class LossScaling:
    """The constants of the state machine, checked once.

    Args:
        initial_scale: the first scale, inside `[min_scale, max_scale]`.
        growth_steps: after so many finite steps in a row the scale grows.
        growth_factor: what it is multiplied by then, at least 1.
        backoff_factor: what it is multiplied by when the hysteresis budget is spent, between 0 and 1.
        hysteresis: how many non-finite steps with no finite one between them make the scale back off.
        min_scale: the floor.
        max_scale: the ceiling.
        dynamic: False keeps the scale where it is; steps are skipped and counted all the same.

    Raises:
        ArgumentError: for a value outside what is said above.
    """

    initial_scale: float = 2.0**15
    growth_steps: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    hysteresis: int = 1
    min_scale: float = 2.0**-14
    max_scale: float = 2.0**24
    dynamic: bool = True

    def __post_init__(self) -> None:
        for name in ("initial_scale", "min_scale", "max_scale"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0 and _fits_float32(value)):
                raise ArgumentError(
                    f"`{name}` must be a positive number between 2**-126 and 2**126, for example {name}="
                    f"{getattr(LossScaling, name)}. Received: {name}={value!r}"
                )
        if self.min_scale > self.max_scale:
            raise ArgumentError(
                "`min_scale` must not be larger than `max_scale`. Received: "
                f"min_scale={self.min_scale!r}, max_scale={self.max_scale!r}"
            )
        if not self.min_scale <= self.initial_scale <= self.max_scale:
            raise ArgumentError(
                "`initial_scale` must lie between `min_scale` and `max_scale`. Received: "
                f"initial_scale={self.initial_scale!r}, min_scale={self.min_scale!r}, max_scale={self.max_scale!r}. "
                "Move the bound, or start inside it."
            )
        if not (_is_number(self.growth_factor) and 1 <= self.growth_factor < math.inf):
            raise ArgumentError(
                "`growth_factor` must be a finite number of at least 1: the scale is multiplied by it (2.0 doubles it, "
                f"1.0 never lets it grow). Received: growth_factor={self.growth_factor!r}"
            )
        if not (_is_number(self.backoff_factor) and 0 < self.backoff_factor < 1):
            raise ArgumentError(
                "`backoff_factor` must be a number between 0 and 1, both excluded: the scale is multiplied by it "
                "(0.5 halves it). To keep the scale fixed, pass dynamic=False. Received: "
                f"backoff_factor={self.backoff_factor!r}"
            )
        # The first is named as the optimizer's user knows it.
        for name, value in (("dynamic_growth_steps", self.growth_steps), ("hysteresis", self.hysteresis)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"`{name}` must be an integer of at least 1. Received: {name}={value!r}")

    def initial_state(self) -> LossScaleState:
        """The state before the first step."""
        zero = tf.constant(0, tf.int64)
        return LossScaleState(
            scale=tf.constant(self.initial_scale, tf.float32),
            finite_steps=zero,
            hysteresis_left=tf.constant(self.hysteresis, tf.int64),
            skipped_steps=zero,
            consecutive_skips=zero,
            nonfinite_losses=zero,
        )

    def bounded(self, scale: tf.Tensor) -> tf.Tensor:
        """The scale, moved inside `[min_scale, max_scale]`; NaN becomes `min_scale`.

        A scale from elsewhere, such as the checkpoint of a wrapper without bounds, may be 0 or infinite.
        """
        scale = tf.where(tf.math.is_nan(scale), tf.cast(self.min_scale, scale.dtype), scale)
        return tf.clip_by_value(scale, self.min_scale, self.max_scale)

    def update(self, state: LossScaleState, finite: tf.Tensor, loss_finite: tf.Tensor | bool = True) -> LossScaleState:
        """The state after a step.

        A finite step refills the hysteresis budget; the `growth_steps`-th in a row lets the scale grow. A non-finite
        step takes one from the budget; the one that spends it lets the scale back off, and refills it.

        Args:
            state: the state before the step.
            finite: bool scalar, whether every gradient of the step was finite.
            loss_finite: bool scalar, whether the loss was. It is only counted.

        Returns:
            The next `LossScaleState`. Its scale is always finite, positive and inside `[min_scale, max_scale]`.

        Example:

        >>> from keras_mp.optimizers.loss_scale import LossScaling
        >>> scaling = LossScaling(initial_scale=1024.0)
        >>> state = scaling.update(scaling.initial_state(), finite=tf.constant(False))
        >>> float(state.scale), int(state.consecutive_skips)
        (512.0, 1)
        """
        grows = finite & (state.finite_steps + 1 >= self.growth_steps)
        spent = ~finite & (state.hysteresis_left <= 1)
        one, zero = tf.ones([], tf.int64), tf.zeros([], tf.int64)
        scale = self.bounded(state.scale)
        if self.dynamic:
            factor = tf.where(grows, self.growth_factor, tf.where(spent, self.backoff_factor, 1.0))
            scale = self.bounded(scale * tf.cast(factor, scale.dtype))
        return LossScaleState(
            scale=scale,
            finite_steps=tf.where(finite & ~grows, state.finite_steps + 1, zero),
            hysteresis_left=tf.where(finite | spent, tf.constant(self.hysteresis, tf.int64), state.hysteresis_left - 1),
            skipped_steps=state.skipped_steps + tf.where(finite, zero, one),
            consecutive_skips=tf.where(finite, zero, state.consecutive_skips + 1),
            nonfinite_losses=tf.where(finite, zero, state.nonfinite_losses + tf.where(loss_finite, zero, one)),
        )

    def explain_skips(self, skipped: int, steps: int, which: str, scale: float, consecutive_skips: int) -> str:
        """That most steps were skipped and what to try, in words for the user.

        Args:
            skipped: how many steps were.
            steps: how many there were.
            which: steps, in words.
            scale: the scale now.
            consecutive_skips: how many steps were skipped since the last one that was not.
        """
        if not consecutive_skips and scale < self.initial_scale:
            advice = (
                f"The scale began at {self.initial_scale:g} and has fallen to {scale:g}. Type "
                f"LossScaleOptimizer(..., initial_scale={scale:g}) to begin there."
            )
        elif scale <= self.min_scale or not self.dynamic:
            advice = (
                "It cannot fall any further. Give the layer whose gradient overflows dtype='float32', or use "
                "mixed_bfloat16, which has float32's range."
            )
        else:
            advice = (
                "Type np.isfinite(x).all() to see that the data are finite, and set `global_clipnorm` on the inner "
                "optimizer or lower the learning rate if the loss grows. If the data and the loss are finite, type "
                f"LossScaleOptimizer(..., initial_scale={max(scale / 16, self.min_scale):g})."
            )
        return (
            f"{skipped} of {steps} training steps {which} were skipped because their gradients were not finite, so the "
            f"model has learnt from {steps - skipped} only. The loss scale is {scale:g} now. {advice}"
        )

    def explain_stuck(self, scale: float, consecutive_skips: int, nonfinite_losses: int) -> str:
        """Why so many steps in a row were skipped and what to try, in words for the user.

        Args:
            scale: the scale now.
            consecutive_skips: how many steps were skipped in a row.
            nonfinite_losses: how many of them had a loss that was itself not finite.
        """
        if nonfinite_losses:
            cause = (
                f"The loss itself was not finite in {nonfinite_losses} of them, so no scale can help: the weights or "
                "the data are at fault. Look in a batch and in the weights for NaN, inf and, where float16 computes, "
                "numbers beyond its 65504, lower the learning rate or set `global_clipnorm` on the inner optimizer, "
                "and see that the loss is computed in float32."
            )
        else:
            if scale <= self.min_scale or not self.dynamic:
                state = "cannot fall any further" if self.dynamic else "is fixed by dynamic=False"
                advice = (
                    "Find the layer whose gradient overflows in 16 bits and give it dtype='float32', use "
                    "mixed_bfloat16, which has float32's range, or pass a smaller `min_scale`."
                )
            else:
                state = "is still above its floor"
                advice = (
                    "Start from a smaller `initial_scale`, lower `hysteresis` or `backoff_factor` so that it falls "
                    "faster, or raise `max_consecutive_skips` to let it fall further."
                )
            cause = (
                f"The loss was finite and its gradients were not, and the scale {state}. See that the data are finite, "
                f"by np.isfinite(x).all(): a relu may turn NaN into 0, but not its gradient. {advice}"
            )
        return (
            f"{consecutive_skips} training steps in a row were skipped because their gradients were not finite. The "
            f"optimizer has not changed a weight since. The loss scale is {scale:g} now; its floor is "
            f"{self.min_scale:g}. {cause}"
        )


def sum_of_squares(gradients: Sequence["tf.Tensor | tf.IndexedSlices | None"]) -> tf.Tensor:
    """The sum of the squares of all values: what `global_norm` starts from, and a witness for `all_finite`.

    Args:
        gradients: dense tensors or `tf.IndexedSlices` of any float dtype and shape; `None` is passed over. The rows of
            `tf.IndexedSlices` count as they stand, as in `tf.linalg.global_norm`.

    Returns:
        A float32 scalar tensor (float64 where a gradient is). It overflows where values are large.
    """
    values = _values(gradients)
    dtype = tf.float64 if any(value.dtype == tf.float64 for value in values) else tf.float32
    if not values:
        return tf.zeros([], dtype)
    return 2 * tf.add_n([tf.cast(tf.nn.l2_loss(value), dtype) for value in values])


def finite_witness(gradients: Sequence["tf.Tensor | tf.IndexedSlices | None"]) -> tf.Tensor:
    """A number that is finite only if every value is, where nobody asks for the sum of squares.

    Values of bfloat16, which has the range of float32, are added up as they are: squares would have to be taken of a
    float32 copy of them.

    Args:
        gradients: as for `sum_of_squares`.

    Returns:
        A scalar tensor, as `sum_of_squares` answers it. It may overflow where values are large.
    """
    dense = _tensors(gradients)
    sums = [tf.cast(tf.reduce_sum(g), tf.float32) for g in dense if g.dtype == tf.bfloat16]
    rest = sum_of_squares([g for g in dense if g.dtype != tf.bfloat16])
    return tf.add_n([rest, *(tf.cast(each, rest.dtype) for each in sums)])


def all_finite(gradients: Sequence["tf.Tensor | tf.IndexedSlices | None"], witness: tf.Tensor) -> tf.Tensor:
    """Whether every value of every gradient is finite.

    A witness answers for nearly every step, in one pass that writes nothing: it is finite only if every value is. Where
    it is not, it may have overflowed over large finite values, so the values themselves are looked at.

    Args:
        gradients: as for `sum_of_squares`.
        witness: their `finite_witness` or `sum_of_squares`.

    Returns:
        A bool scalar tensor.

    Example:
    >>> from keras_mp.optimizers.loss_scale import all_finite, sum_of_squares
    >>> for gradients in [tf.constant([1.0, 3e38]), None], [tf.constant([1.0, float("inf")])]:
    ...     print(bool(all_finite(gradients, sum_of_squares(gradients))))
    True
    False
    """
    return tf.cond(
        tf.math.is_finite(witness),
        lambda: tf.constant(True),
        lambda: tf.reduce_all([tf.reduce_all(tf.math.is_finite(value)) for value in _values(gradients)]),
    )


def global_norm(gradients: Sequence["tf.Tensor | tf.IndexedSlices | None"], squares: tf.Tensor) -> tf.Tensor:
    """The Euclidean norm of all gradients as one vector, finite wherever the true norm is.

    Args:
        gradients: as for `sum_of_squares`, all finite.
        squares: their `sum_of_squares`.

    Returns:
        A scalar tensor of the dtype of `squares`.

    Example:
    >>> from keras_mp.optimizers.loss_scale import global_norm, sum_of_squares
    >>> gradients = [tf.constant([3e30, 4e30])]
    >>> f"{global_norm(gradients, sum_of_squares(gradients)):.0e}"
    '5e+30'
    """

    def rescaled() -> tf.Tensor:
        # By the largest value, so that no square overflows.
        values = [tf.cast(value, squares.dtype) for value in _values(gradients)]
        largest = tf.reduce_max([tf.reduce_max(tf.abs(value)) for value in values])
        return largest * tf.sqrt(sum_of_squares([value / largest for value in values]))

    return tf.cond(tf.math.is_finite(squares), lambda: tf.sqrt(squares), rescaled)


def _tensors(gradients: Sequence["tf.Tensor | tf.IndexedSlices | None"]) -> list[tf.Tensor]:
    return [
        tf.convert_to_tensor(g.values if isinstance(g, tf.IndexedSlices) else g) for g in gradients if g is not None
    ]


def _values(gradients: Sequence["tf.Tensor | tf.IndexedSlices | None"]) -> list[tf.Tensor]:
    # In float32 at least: squares of float16 overflow above 255.
    return [tf.cast(g, tf.float32) if g.dtype.size < 4 else g for g in _tensors(gradients)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fits_float32(value: float) -> bool:
    """Whether neither the value nor its reciprocal is infinite, zero or subnormal in float32."""
    return 2.0**-126 <= abs(value) <= 2.0**126
