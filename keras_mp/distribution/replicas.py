"""Replicas of `tf.distribute` that act as one device: their sums, and a program run alike on every device."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from keras_mp._compat import tf_replicas
from keras_mp.errors import ArgumentError

__all__ = [
    "apply_on_each_device",
    "assign_from_replicas",
    "maximum_over_replicas",
    "on_each_device",
    "once_for_all_replicas",
    "require_made_under",
    "share_of_batch",
    "sum_over_replicas",
]

# A dense or sparse tensor.
_Value: TypeAlias = "tf.Tensor | tf.IndexedSlices"


def sum_over_replicas(values: "Sequence[_Value | None]") -> list[_Value]:
    """Adds up the values of all replicas. Every replica of every worker gets the same sums.

    Args:
        values: tensors of the same shape and dtype on all replicas. `tf.IndexedSlices` stay sparse, `None` is passed
            over. Call it in a replica context, or without a strategy, where it changes nothing.

    Returns:
        The sums, in the same order.
    """
    if not tf.distribute.has_strategy():
        return list(values)
    context = tf.distribute.get_replica_context()
    sums: list[Any] = list(values)
    # One collective for each dtype: workers pack tensors into one, which has one dtype.
    for dtype in dict.fromkeys(value.dtype for value in values if value is not None):
        places = [place for place, value in enumerate(values) if value is not None and value.dtype == dtype]
        reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, [_gatherable(values[place]) for place in places])
        for place, value in zip(places, reduced, strict=True):
            sums[place] = _with_values(value, tf.bitcast(value.values, dtype)) if value.dtype != dtype else value
    return sums


def _gatherable(value: _Value) -> _Value:
    """Returns a value in a form that can be sent. Sparse values are gathered, and TensorFlow gathers no bfloat16.

    So their bits are sent as float16, and nothing computes with that.
    """
    if not isinstance(value, tf.IndexedSlices) or value.dtype != tf.bfloat16:
        return value
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        return value  # a TPU adds them up, and knows bfloat16
    return _with_values(value, tf.bitcast(value.values, tf.float16))


def _with_values(slices: tf.IndexedSlices, values: tf.Tensor) -> tf.IndexedSlices:
    return tf.IndexedSlices(values, slices.indices, slices.dense_shape)


def maximum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """Returns the elementwise maximum over all replicas. It is the same on every replica of every worker.

    Args:
        value: a dense tensor of the same shape and dtype on all replicas.

    Returns:
        A tensor of that shape and dtype.
    """
    if not tf.distribute.has_strategy():
        return value
    gathered = tf.distribute.get_replica_context().all_gather(value[tf.newaxis], axis=0)
    return tf.reduce_max(gathered, axis=0)


def share_of_batch(rows: "int | tf.Tensor") -> tuple["tf.Tensor | None", tf.Tensor]:
    """Returns the share of the batch that this replica has.

    Args:
        rows: the number of this replica's rows. A Python int if a traced graph knows it, else an int scalar.

    Returns:
        The share, a float32 scalar between 0 and 1, or None for a single replica. And the number of rows of the whole
        batch, an int64 scalar.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    known = isinstance(rows, int) and not tf.executing_eagerly()
    rows = tf.cast(rows, tf.int64)
    if replicas == 1:
        return None, rows
    if known:  # a shape in a graph is static only if no replica can have fewer rows
        return tf.constant(1.0 / replicas), rows * replicas
    (total,) = sum_over_replicas([rows])
    return tf.cast(tf.math.divide_no_nan(tf.cast(rows, tf.float64), tf.cast(total, tf.float64)), tf.float32), total


def assign_from_replicas(state: "Sequence[tuple[keras.Variable, tf.Tensor]]", share: "tf.Tensor | None") -> None:
    """Assigns the new values of all replicas' layers, so that the copies of a variable stay equal.

    Each float variable becomes the mean over the replicas, weighted by their rows. If a value is non-finite on any of
    them, the variable stays as it was, as in a skipped step. Integers, such as counters and seeds, are the same on all
    replicas. Variables that set an aggregation, as metrics do, are left to TensorFlow.

    Args:
        state: pairs of a variable and its new value on this replica. Every replica has the same variables.
        share: this replica's share of the batch, from `share_of_batch`.
    """
    if share is None:
        for variable, value in state:
            variable.assign(value)
        return
    averaged = [
        (variable, value)
        for variable, value in state
        if value.dtype.is_floating and variable.aggregation == "none" and variable.synchronization != "on_read"
    ]
    # The statistics of an empty replica may be NaN and must not count.
    sums = sum_over_replicas(
        [tf.where(share > 0, value * tf.cast(share, value.dtype), tf.zeros_like(value)) for _, value in averaged]
    )
    means = {
        id(variable): tf.where(tf.math.is_finite(mean), mean, tf.cast(variable.value, mean.dtype))
        for (variable, _), mean in zip(averaged, sums, strict=True)
    }
    for variable, value in state:
        variable.assign(means.get(id(variable), value))


def apply_on_each_device(
    optimizer: keras.optimizers.Optimizer, gradients: "Sequence[_Value | None]", variables: Sequence[keras.Variable]
) -> None:
    """Applies the sum of all replicas' gradients with a Keras optimizer, as one device would.

    By itself, Keras's optimizer clips the gradient of each replica under a strategy. It fails where it accumulates
    gradients or overwrites weights with their averages.

    Args:
        optimizer: an optimizer that does not add up over replicas itself.
        gradients: this replica's gradients, one for each variable.
        variables: the variables to update.
    """
    if not optimizer.built:
        once_for_all_replicas(lambda: optimizer.build(variables), variables)
    inner = getattr(optimizer, "inner_optimizer", None)
    optimizers = [each for each in (optimizer, inner) if each is not None]
    optimizers += [each for one in optimizers for each in getattr(one, "optimizers", [])]
    on_each_device(
        lambda *sums: optimizer.apply(list(sums), variables),
        sum_over_replicas(gradients),
        variables=[v for v in [*variables, *optimizer.variables] if isinstance(v, keras.Variable)],
        optimizers=optimizers,
    )


def once_for_all_replicas(make_variables: Callable[[], None], variables: Sequence[keras.Variable]) -> None:
    """Creates variables inside a training step: outside its graph, and with a copy on each device.

    Args:
        make_variables: creates them. Every replica must get here.
        variables: variables that the new ones are made for, as slots are for weights.

    Raises:
        ArgumentError: one of `variables` was made outside the strategy's scope.
    """
    if tf.distribute.has_strategy():
        require_made_under(tf.distribute.get_strategy(), variables)

    def make(strategy: tf.distribute.Strategy | None = None) -> None:
        with tf.init_scope():
            make_variables()

    if tf_replicas.merges_replicas():
        tf.distribute.get_replica_context().merge_call(make)
    else:
        make()


def on_each_device(
    program: Callable[..., None],
    arguments: Sequence[Any],
    variables: Sequence[keras.Variable],
    optimizers: Sequence[keras.optimizers.Optimizer],
) -> None:
    """Runs a program for one device once on every device, on that device's copies of the variables.

    Call it in a replica context with arguments that are equal on all replicas. Then the copies stay equal. The program
    may do what a strategy forbids: put a condition around an update, or call a function compiled by XLA.

    Args:
        program: called with the device's values of `*arguments`.
        arguments: a sequence of nested structures of tensors and `None`.
        variables: all variables that the program reads or writes.
        optimizers: the optimizers that it calls.

    Raises:
        ArgumentError: one of the variables was made outside the strategy's scope.
    """
    if not tf.distribute.has_strategy():
        program(*arguments)
        return
    strategy = tf.distribute.get_strategy()
    context = tf.distribute.get_replica_context()
    if isinstance(strategy, tf.distribute.TPUStrategy):
        # All cores run one compiled program, and nothing can step out of it. It allows a condition around an update.
        # Only the sums must not be taken again.
        with tf_replicas.without_all_reduce(optimizers):
            program(*arguments)
        return
    require_made_under(strategy, variables)
    devices = strategy.extended.worker_devices
    if not tf_replicas.merges_replicas():
        with tf_replicas.one_device(devices.index(context.devices[0]), variables, optimizers):
            program(*arguments)
        return

    def on_all_devices(strategy: tf.distribute.Strategy, arguments: Any) -> None:
        for index, device in enumerate(devices):
            local = tf.nest.map_structure(lambda value: _local(strategy, value, index), arguments)  # noqa: B023
            with tf.device(device), tf_replicas.one_device(index, variables, optimizers):
                program(*local)

    context.merge_call(on_all_devices, args=(arguments,))


def _local(strategy: tf.distribute.Strategy, value: tf.Tensor | None, index: int) -> tf.Tensor | None:
    return value if value is None else strategy.experimental_local_results(value)[index]


def require_made_under(strategy: tf.distribute.Strategy, variables: Sequence[keras.Variable]) -> None:
    """Checks that every variable has a copy on each device of a strategy.

    Args:
        strategy: the strategy that uses them.
        variables: the variables.

    Raises:
        ArgumentError: a variable was made outside the strategy's scope.
    """
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return  # it has several kinds of variables, and raises itself
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
