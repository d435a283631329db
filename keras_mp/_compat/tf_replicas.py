"""Strategies and replicas of `tf.distribute`, beyond its public names."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import keras
import tensorflow as tf

# `tf.distribute` has no public way to step out of a strategy. `one_device` does that.
from tensorflow.python.distribute import distribute_lib as _distribute_lib

__all__ = [
    "is_default_strategy",
    "merges_replicas",
    "mirrored_strategy",
    "one_device",
    "strategy_of",
    "without_all_reduce",
]

# TensorFlow numbers the collective operations of each strategy from the same start. So two strategies in one process,
# such as a notebook whose cells run again, mix up their operations: they fail, or wait for ever. TensorFlow's own tests
# give each strategy another start by this attribute, which has no public name.
_collective_key_bases = itertools.count(1_000_000, 1_000_000)


def mirrored_strategy(devices: list[str]) -> tf.distribute.MirroredStrategy:
    """Returns a `tf.distribute.MirroredStrategy` that works beside others in one process.

    Args:
        devices: the names of its devices.
    """
    members = {"_collective_key_base": next(_collective_key_bases), "__module__": __name__}
    return type("MirroredStrategy", (tf.distribute.MirroredStrategy,), members)(devices)


@contextlib.contextmanager
def one_device(
    index: int, variables: Iterable[keras.Variable], optimizers: Iterable[keras.optimizers.Optimizer]
) -> Iterator[None]:
    """Inside, the program runs without a strategy: each variable is its copy on one device.

    Keras's optimizers reduce gradients and update the copies on all devices. They allow neither a condition around that
    nor XLA. A program in this block has neither limit, and must run once for each device.

    Args:
        index: the index of the device in this process.
        variables: the variables that the program reads and writes. Variables without copies stay as they are.
        optimizers: the optimizers that update them.
    """
    whole = {id(variable): (variable, variable._value) for variable in variables}
    strategies = [(optimizer, optimizer._distribution_strategy) for optimizer in optimizers]
    try:
        for variable, value in whole.values():
            if isinstance(value, tf.distribute.DistributedValues):
                variable._value = value.values[index]
        with _without_strategy():
            for optimizer, _ in strategies:
                optimizer._distribution_strategy = tf.distribute.get_strategy()
            yield
    finally:
        for variable, value in whole.values():
            variable._value = value
        for optimizer, strategy in strategies:
            optimizer._distribution_strategy = strategy


@contextlib.contextmanager
def without_all_reduce(optimizers: Iterable[keras.optimizers.Optimizer]) -> Iterator[None]:
    """Inside, these optimizers take their gradients as sums over replicas.

    Args:
        optimizers: the optimizers whose `apply` is called inside.
    """
    optimizers = list(optimizers)
    for optimizer in optimizers:
        optimizer._all_reduce_sum_gradients = list
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer._all_reduce_sum_gradients


@contextlib.contextmanager
def _without_strategy() -> Iterator[None]:
    _distribute_lib._push_per_thread_mode(_distribute_lib._get_default_replica_mode())
    try:
        yield
    finally:
        _distribute_lib._pop_per_thread_mode()


def strategy_of(made: "keras.Model | keras.optimizers.Optimizer") -> tf.distribute.Strategy | None:
    """Returns the strategy in whose scope a model or an optimizer was made, or None.

    No public name tells it for an optimizer. For a model made in no scope, the public name tells the current strategy.
    """
    if isinstance(made, keras.Model):
        return made._distribute_strategy
    strategy = made._distribution_strategy
    return strategy if isinstance(strategy, tf.distribute.Strategy) and not is_default_strategy(strategy) else None


def is_default_strategy(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether a strategy is TensorFlow's default one, whose class has no public name."""
    return isinstance(strategy, _distribute_lib._DefaultDistributionStrategy)


def merges_replicas() -> bool:
    """Whether replicas of the current strategy meet in `merge_call`, which has no public name to ask.

    Otherwise each replica runs alone, as several GPUs under XLA do.
    """
    return tf.distribute.has_strategy() and not tf.__internal__.distribute.strategy_supports_no_merge_call()
