"""Copies of a model that are trained for the time it takes, in turns."""

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

# A turn of a short step is several calls, so that the clock and what Python does between calls count little.
_TURN_SECONDS = 0.03
_CALLS_AT_MOST = 20

# What float32 rounds away of a level, after some operations: eight units in the last place.
_RESOLUTION = 8 * 2.0**-23

# The least that a feature is taken to vary by, as a share of what the whole output does: what is next to nothing, as of
# a unit that is never active, is rounded with what it is added up from.
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
        """Has what the optimizer keeps, which is there once it is built, given back by `restore`, too."""
        known = {id(variable) for variable, _ in self._first}
        self._first += [(v, tf.identity(v.value)) for v in self.model.optimizer.variables if id(v) not in known]

    def restore(self) -> None:
        """Gives weights and optimizer the values that they had before any step."""
        for variable, value in self._first:
            variable.assign(value)

    def outputs(self, x: Any, jit_compile: bool, runs: int = 1) -> list[list[np.ndarray]]:
        """The outputs for a batch on the weights that the model had at first, which the copy gets back for each run.

        Args:
            x: a batch of inputs.
            jit_compile: whether XLA compiles the forward pass.
            runs: how often it runs: a model that samples draws other numbers each time.
        """
        runtime.set_remapper(self.remapper)

        @tf.autograph.experimental.do_not_convert
        def forward(x: Any) -> Any:
            return keras_models.call(self.model, x, training=False)

        run = tf.function(forward, jit_compile=jit_compile)
        several = []
        for _ in range(runs):
            self.restore()
            # NumPy has no bfloat16 that it can subtract in.
            several.append([np.asarray(tf.cast(output, tf.float64)) for output in keras.tree.flatten(run(x))])
        return several


class Step:
    """The training step of a copy, compiled in one way, as `fit` calls it.

    Args:
        copy: what it trains.
        batches: yields the same batch for ever. Steps can share it.
        jit_compile: whether XLA compiles it.
        steps_per_execution: how many steps a call runs.

    Attributes:
        times: milliseconds of one step, a median for each turn.
        first_ms: the same of a first call after compilation.
        first_loss: the loss of the first step.
        error: what a turn raised, after which there are no more.

    Raises:
        Exception: whatever the step raises when it is traced, compiled and run for the first time.
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
        self.call()  # grappler and the allocator are done after it
        self.first_ms = self.call()

    def call(self, batches: Iterator[Any] | None = None) -> float:
        """Milliseconds of one step, of one call.

        Args:
            batches: an iterator over others than the one batch.
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
        """Times one turn, from the first weights on where steps on the one batch have led away from what is finite."""
        if not math.isfinite(self._loss):
            self.copy.restore()
        if runtime.remapper_enabled() != self.copy.remapper:
            self.call()  # the first call under another setting of grappler's takes longer
        self.times.append(statistics.median(self.call() for _ in range(self._calls)))

    @property
    def _calls(self) -> int:
        calls = math.ceil(_TURN_SECONDS * 1000 / max(self.first_ms * self.steps_per_execution, 1e-3))
        return max(1, min(calls, _CALLS_AT_MOST))

    @property
    def turn_seconds(self) -> float:
        """What a turn is going to take."""
        return self._calls * self.step_ms * self.steps_per_execution / 1000

    @property
    def step_ms(self) -> float:
        """The median over all turns; before the first, what it took when it was made."""
        return statistics.median(self.times) if self.times else self.first_ms


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The ratio of two times that were taken in the same rounds, and the standard error of it, as a share of it.

    What slows the machine for a while slows both in that round, and leaves their ratio.

    Args:
        times: one for each round.
        others: the same of what they are compared with.

    Returns:
        The median of the rounds' ratios, and 1.25 times what the standard error of their mean would be if they were
        normal; 1 where there are too few rounds to tell.

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
        rounds: how many.
        end: when to stop, as `time.perf_counter` tells it. A round that would not be done by then is not begun.
        expected: seconds that the first round is going to take.

    Returns:
        How many rounds were done. A step whose turn raises keeps the error and gets no more.
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
    """The largest error of an output's feature, as a share of what it varies by, or infinite for what is not finite.

    Both are root mean squares: of the difference, and of the deviation from the mean over the batch. So 1000 +- 1 is
    judged by the 1. What float32 itself cannot tell apart is no error. A feature that does not vary is judged by its
    level, and no feature by less than a share of what the whole output varies by.

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
    # Rows x positions x features, of which masked are those that are meant to be infinite.
    shape = (*expected.shape, 1, 1)[:1] if expected.ndim < 2 else expected.shape
    expected = np.ma.masked_array(expected, ~known).reshape(shape[0], -1, shape[-1] if len(shape) > 1 else 1)
    difference = np.ma.abs(np.ma.masked_array(output, ~known).reshape(expected.shape) - expected)
    level = np.ma.abs(expected).max(axis=(0, 1)).filled(0.0)
    resolution = _RESOLUTION * level
    rows = expected.shape[0]
    # One row varies over its entries alone.
    variance = expected.var(axis=0).mean(axis=0).filled(0.0) if rows > 1 else np.full(level.shape, expected.var())
    spread = np.sqrt(variance)
    varies = spread > resolution
    whole = np.sqrt(np.mean(variance[varies])) if varies.any() else 0.0
    # Of few rows the spread of one feature is known badly.
    floor = max(_LEAST_SPREAD, 1 / math.sqrt(rows)) * whole
    scale = np.maximum(np.where(varies, spread, level), floor)
    excess = np.ma.maximum(difference - resolution, 0.0)
    errors = np.sqrt((excess**2).mean(axis=(0, 1)).filled(0.0))
    return float(np.max(errors / np.where(scale > 0, scale, 1.0)))


def mean_of_runs(runs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """The mean of each output over several runs of a model that samples.

    Args:
        runs: the outputs of each.

    Example:
    >>> mean_of_runs([[np.array([1.0, 2.0])], [np.array([3.0, 2.0])]])
    [array([2., 2.])]
    """
    return [np.mean(outputs, axis=0) for outputs in zip(*runs, strict=True)]
