"""Replicas of `tf.distribute` that act as one: what they agree on, and a program run alike on every device."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp import backend
from keras_mp.errors import ArgumentError

__all__ = ["maximum_over_replicas", "on_each_device", "once_for_all_replicas", "sum_over_replicas"]


def sum_over_replicas(values: "Sequence[tf.Tensor | tf.IndexedSlices | None]") -> list[Any]:
    """Adds up what each replica holds; every replica of every worker gets the same sums.

    Args:
        values: tensors of one shape and dtype on all replicas, `tf.IndexedSlices`, which stay sparse, or `None`, which
            is passed over. Called in a replica context, or without a strategy, where it changes nothing.

    Returns:
        The sums, in the same order.
    """
    if not tf.distribute.has_strategy():
        return list(values)
    given = [value for value in values if value is not None]
    sums = iter(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, given) if given else [])
    return [None if value is None else next(sums) for value in values]


def maximum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The largest of what the replicas hold, element by element; the same on every replica of every worker.

    Args:
        value: a dense tensor of one shape and dtype on all replicas.

    Returns:
        A tensor of that shape and dtype.
    """
    if not tf.distribute.has_strategy():
        return value
    gathered = tf.distribute.get_replica_context().all_gather(value[tf.newaxis], axis=0)
    return tf.reduce_max(gathered, axis=0)


def once_for_all_replicas(make_variables: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Creates variables from inside a training step: outside its graph, and with a copy on each device.

    Args:
        make_variables: creates them. Every replica must get here.
        variables: those that they are made after, as slots are after weights.

    Raises:
        ArgumentError: one of the latter was made outside the strategy's scope.
    """
    if tf.distribute.has_strategy():
        _require_made_under(tf.distribute.get_strategy(), variables)

    def make(strategy: tf.distribute.Strategy | None = None) -> None:
        with tf.init_scope():
            make_variables()

    if tf.distribute.has_strategy() and not tf.__internal__.distribute.strategy_supports_no_merge_call():
        tf.distribute.get_replica_context().merge_call(make)
    else:
        make()


def on_each_device(
    program: Callable[..., None],
    arguments: Any,
    variables: Sequence[keras.Variable],
    optimizers: Sequence[keras.optimizers.Optimizer],
) -> None:
    """Runs a program that knows of one device only, once on every device, on that device's copies of the variables.

    Call it in a replica context with arguments that are equal on all replicas. The copies then stay equal, and the
    program may hold what a strategy forbids: a condition around an update, or a function compiled by XLA.

    Args:
        program: called with `*arguments` as its device has them.
        arguments: a sequence of nested structures of tensors and `None`.
        variables: all that the program reads or writes.
        optimizers: those that it updates with.

    Raises:
        ArgumentError: one of the variables was made outside the strategy's scope.
    """
    if not tf.distribute.has_strategy():
        program(*arguments)
        return
    strategy = tf.distribute.get_strategy()
    context = tf.distribute.get_replica_context()
    if isinstance(strategy, tf.distribute.TPUStrategy):
        # One program for all cores, compiled as a whole: there is no stepping out of it. A condition may stand around
        # an update there; only the sums must not be taken again.
        with backend.without_all_reduce(optimizers):
            program(*arguments)
        return
    _require_made_under(strategy, variables)
    devices = strategy.extended.worker_devices
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        # Each replica runs on its own, as several GPUs under XLA do.
        with backend.one_device(devices.index(context.devices[0]), variables, optimizers):
            program(*arguments)
        return

    def on_all_devices(strategy: tf.distribute.Strategy, arguments: Any) -> None:
        for index, device in enumerate(devices):
            local = tf.nest.map_structure(lambda value: _local(strategy, value, index), arguments)  # noqa: B023
            with tf.device(device), backend.one_device(index, variables, optimizers):
                program(*local)

    context.merge_call(on_all_devices, args=(arguments,))


def _local(strategy: tf.distribute.Strategy, value: Any, index: int) -> Any:
    return value if value is None else strategy.experimental_local_results(value)[index]


def _require_made_under(strategy: tf.distribute.Strategy, variables: Sequence[keras.Variable]) -> None:
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return  # it has several kinds of variables, and says so itself
    devices = len(strategy.extended.worker_devices)
    if devices == 1:
        return
    for variable in variables:
        if not isinstance(variable.value, tf.distribute.DistributedValues):
            raise ArgumentError(
                f"{variable.path!r} was made outside the strategy's scope, so it has no copy on each of the {devices} "
                f"devices of {type(strategy).__name__}. Make the model and the optimizer, and call `compile`, inside "
                "`with strategy.scope():`."
            )
