"""Times the training steps of copies of a model in turns, and compares their outputs."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_models, runtime

__all__ = ["Copy", "Step", "largest_error", "mean_of_runs", "paired_ratio", "take_turns"]

# A turn of a short step is several calls, so the clock and Python between calls count little.
_TURN_SECONDS = 0.03
_CALLS_AT_MOST = 20

# The rounding error of float32 after some operations, relative to a level: eight units in the last place.
_RESOLUTION = 8 * 2.0**-23

# The least spread of a feature, as a share of the whole output's spread. A unit that is never active has next to no
# spread, but the rounding errors of its summands.
_LEAST_SPREAD = 0.1


class Copy:
    """A copy of a model under one policy, which its steps train.

    Args:
        model: the copy, compiled and built.
        policy: the name of its policy.
        current: whether it is the model as it is.
        remapper: whether grappler may fuse while it runs; see `runtime.set_remapper`.
    """

    def __init__(self, model: keras.Model, policy: str, current: bool, remapper: bool) -> None:
        self.model, self.policy, self.current, self.remapper = model, policy, current, remapper
        self._first = [(variable, tf.identity(variable.value)) for variable in model.weights]

    def keep_optimizer(self) -> None:
        """Makes `restore` reset the optimizer's variables too. They exist once it is built."""
        known = {id(variable) for variable, _ in self._first}
        self._first += [(v, tf.identity(v.value)) for v in self.model.optimizer.variables if id(v) not in known]

    def restore(self) -> None:
        """Resets the weights and the optimizer to their values before the first step."""
        for variable, value in self._first:
            variable.assign(value)

    def outputs(self, x: Any, jit_compile: bool, runs: int = 1) -> list[list[np.ndarray]]:
        """Returns the outputs for a batch on the first weights, which are restored before each run.

        Args:
            x: a batch of inputs.
            jit_compile: whether XLA compiles the forward pass.
            runs: the number of runs. A model that samples draws other numbers each time.
        """
        runtime.set_remapper(self.remapper)

        @tf.autograph.experimental.do_not_convert
        def forward(x: Any) -> Any:
            return keras_models.call(self.model, x, training=False)

        run = tf.function(forward, jit_compile=jit_compile)
        several = []
        for _ in range(runs):
            self.restore()
            # NumPy cannot subtract in bfloat16.
            several.append([np.asarray(tf.cast(output, tf.float64)) for output in keras.tree.flatten(run(x))])
        return several


class Step:
    """The training step of a copy, compiled in one way, as `fit` calls it.

    Args:
        copy: the copy to train.
        batches: yields the same batch for ever. Steps can share it.
        jit_compile: whether XLA compiles it.
        steps_per_execution: the number of steps in a call.

    Attributes:
        times: milliseconds of one step, a median for each turn.
        first_ms: milliseconds of a step in the first call after compilation.
        first_loss: the loss of the first step.
        error: the exception that a turn raised. No turn follows it.

    Raises:
        Exception: any exception of the step's first trace, compilation and run.
    """

    def __init__(self, copy: Copy, batches: Iterator[Any], jit_compile: bool, steps_per_execution: int) -> None:
        self.copy, self.jit_compile, self.steps_per_execution = copy, jit_compile, steps_per_execution
        self.times: list[float] = []
        self.error: Exception | None = None
        model = copy.model
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        copy.keep_optimizer()
        copy.restore()
        model.jit_compile, model.steps_per_execution = jit_compile, steps_per_execution
        if model.jit_compile != jit_compile:
            unable = [
                repr(layer.name) for layer in keras_layers.layers_by_path(model).values() if not layer.supports_jit
            ]
            raise ValueError(f"XLA cannot compile {', '.join(unable) or 'it'}.")
        model.make_train_function(force=True)
        self._function = model.train_function
        self._batches = batches
        self._loss = math.nan
        self.call()
        self.first_loss = self._loss
        self.call()  # lets grappler and the allocator finish
        self.first_ms = self.call()

    def call(self, batches: Iterator[Any] | None = None) -> float:
        """Makes one call and returns the milliseconds of one step.

        Args:
            batches: an iterator over other batches than the cached one.
        """
        if runtime.remapper_enabled() != self.copy.remapper:
            runtime.set_remapper(self.copy.remapper)
        start = time.perf_counter()
        logs = self._function(self._batches if batches is None else batches)
        keras.tree.map_structure(np.asarray, logs)  # waits for it, as the progress bar of `fit` does
        milliseconds = (time.perf_counter() - start) * 1000 / self.steps_per_execution
        self._loss = float(logs["loss"]) if isinstance(logs, dict) and "loss" in logs else 0.0
        return milliseconds

    def turn(self) -> None:
        """Times one turn. If the loss is no longer finite, it starts again at the first weights."""
        if not math.isfinite(self._loss):
            self.copy.restore()
        if runtime.remapper_enabled() != self.copy.remapper:
            self.call()  # the first call after a change of grappler's settings takes longer
        self.times.append(statistics.median(self.call() for _ in range(self._calls)))

    @property
    def _calls(self) -> int:
        calls = math.ceil(_TURN_SECONDS * 1000 / max(self.first_ms * self.steps_per_execution, 1e-3))
        return max(1, min(calls, _CALLS_AT_MOST))

    @property
    def turn_seconds(self) -> float:
        """The expected seconds of a turn."""
        return self._calls * self.step_ms * self.steps_per_execution / 1000

    @property
    def step_ms(self) -> float:
        """The median over all turns. Before the first turn, the time of the first call."""
        return statistics.median(self.times) if self.times else self.first_ms


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Returns the ratio of two times that were taken in the same rounds, and its relative standard error.

    A slow moment of the machine slows both times of a round, so their ratio stays.

    Args:
        times: one for each round.
        others: the times to compare with, one for each round.

    Returns:
        The median of the rounds' ratios, and its standard error as a share of it. The error of a median is 1.25 times
        the error of a mean of normal values. It is 1 for fewer than three rounds.

    Example:
    >>> paired_ratio([1.0, 2.0, 1.0, 3.0], [2.0, 4.0, 2.0, 6.0])
    (0.5, 0.0)
    """
    ratios = [one / other for one, other in zip(times, others, strict=True)]
    middle = statistics.median(ratios)
    if len(ratios) < 3:
        return middle, 1.0
    low, _, high = statistics.quantiles(ratios, n=4)
    # The quartiles of normal values are 1.35 standard deviations apart.
    return middle, 1.25 / 1.35 * (high - low) / math.sqrt(len(ratios)) / middle


def take_turns(steps: Sequence[Step], rounds: int, end: float, expected: float) -> int:
    """Times steps in turns.

    Args:
        steps: each gets a turn in each round.
        rounds: the number of rounds.
        end: when to stop, by `time.perf_counter`. A round that would not finish by then is not begun.
        expected: expected seconds of the first round.

    Returns:
        The number of rounds done. A step whose turn raises keeps the error and gets no more turns.
    """
    took = expected
    for done in range(rounds):
        start = time.perf_counter()
        if start + took > end:
            return done
        for step in steps:
            if step.error is None:
                try:
                    step.turn()
                except Exception as error:
                    step.error = error
        took = time.perf_counter() - start
    return rounds


def largest_error(outputs: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Returns the largest error of an output's feature, as a share of its spread; infinite if it is not finite.

    Both are root mean squares: of the difference, and of the deviation from the mean over the batch. So 1000 +- 1 is
    judged by the 1. Differences below float32's resolution are no errors. A constant feature is judged by its level,
    and no feature by less than a share of the whole output's spread.

    Args:
        outputs: arrays with the batch first and features last.
        reference: arrays of the same shapes.

    Example:
    >>> round(largest_error([np.array([[1000.0], [1002.1]])], [np.array([[1000.0], [1002.0]])]), 3)
    0.07
    """
    if [each.shape for each in outputs] != [each.shape for each in reference]:
        return math.inf
    return max(map(_error, outputs, reference), default=0.0)


def _error(output: np.ndarray, expected: np.ndarray) -> float:
    known = np.isfinite(expected)
    if not np.array_equal(known, np.isfinite(output)):
        return math.inf
    if not known.any():
        return 0.0
    # Rows x positions x features. The mask hides intended infinities.
    shape = (*expected.shape, 1, 1)[:1] if expected.ndim < 2 else expected.shape
    expected = np.ma.masked_array(expected, ~known).reshape(shape[0], -1, shape[-1] if len(shape) > 1 else 1)
    difference = np.ma.abs(np.ma.masked_array(output, ~known).reshape(expected.shape) - expected)
    level = np.ma.abs(expected).max(axis=(0, 1)).filled(0.0)
    resolution = _RESOLUTION * level
    rows = expected.shape[0]
    # A single row varies only over its entries.
    variance = expected.var(axis=0).mean(axis=0).filled(0.0) if rows > 1 else np.full(level.shape, expected.var())
    spread = np.sqrt(variance)
    varies = spread > resolution
    whole = np.sqrt(np.mean(variance[varies])) if varies.any() else 0.0
    # Few rows tell the spread of one feature only roughly.
    floor = max(_LEAST_SPREAD, 1 / math.sqrt(rows)) * whole
    scale = np.maximum(np.where(varies, spread, level), floor)
    excess = np.ma.maximum(difference - resolution, 0.0)
    errors = np.sqrt((excess**2).mean(axis=(0, 1)).filled(0.0))
    return float(np.max(errors / np.where(scale > 0, scale, 1.0)))


def mean_of_runs(runs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Returns the mean of each output over several runs of a model that samples.

    Args:
        runs: the outputs of each run.

    Example:
    >>> mean_of_runs([[np.array([1.0, 2.0])], [np.array([3.0, 2.0])]])
    [array([2., 2.])]
    """
    return [np.mean(outputs, axis=0) for outputs in zip(*runs, strict=True)]
