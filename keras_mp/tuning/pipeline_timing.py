"""Times the user's input pipeline, alone and with a training step."""

import statistics
import time
from collections.abc import Callable

import tensorflow as tf

from keras_mp.tuning.findings import Pipeline
from keras_mp.tuning.timing import Step

__all__ = ["time_pipeline"]

# The longest that the pipeline is timed, and the most batches.
SECONDS = 5.0
_BATCHES = 20


def time_pipeline(step: Step, dataset: tf.data.Dataset) -> Pipeline:
    """Times a step with the user's dataset, the same step with a cached batch, and the dataset alone.

    Args:
        step: a step that runs once a call.
        dataset: batches as `fit` takes them.
    """
    # It repeats, so a short dataset is enough. Training restarts the dataset too.
    batches = iter(dataset.repeat())
    start = time.perf_counter()
    step.call(batches)  # fills the buffers of the dataset
    seconds = max(SECONDS - (time.perf_counter() - start), 0.0) / 2
    fed = _some(lambda: step.call(batches), seconds)
    cached = _some(step.call, seconds / 2)
    alone = _some(lambda: _milliseconds(lambda: next(batches)), seconds)
    # A buffer yields some batches at once and others late, so only the mean tells.
    return Pipeline(statistics.median(cached), statistics.fmean(fed), statistics.fmean(alone))


def _some(run: Callable[[], float], seconds: float) -> list[float]:
    """Returns the values of repeated calls: one at least, until the time is over or there are enough."""
    end = time.perf_counter() + seconds
    values = [run()]
    while len(values) < _BATCHES and time.perf_counter() < end:
        values.append(run())
    return values


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000
