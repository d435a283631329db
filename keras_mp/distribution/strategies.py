"""Replicas of `tf.distribute` that act as one: what they agree on, and a program run alike on every device."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import runtime, tf_replicas
from keras_mp.distribution import cluster
from keras_mp.errors import ArgumentError, DistributionError

__all__ = [
    "apply_on_each_device",
    "assign_from_replicas",
    "maximum_over_replicas",
    "on_each_device",
    "once_for_all_replicas",
    "require_one_strategy",
    "rows_of_replicas",
    "share_of_batch",
    "strategy",
    "sum_over_replicas",
]


_KINDS = ("auto", "default", "mirrored", "multiworker", "tpu")
_COMMUNICATION = {
    "auto": tf.distribute.experimental.CommunicationImplementation.AUTO,
    "nccl": tf.distribute.experimental.CommunicationImplementation.NCCL,
    "ring": tf.distribute.experimental.CommunicationImplementation.RING,
}
# Where a Cloud TPU is announced that is not in this machine.
_TPU_VARIABLES = ("TPU_NAME", "COLAB_TPU_ADDR", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS")


def strategy(
    kind: str = "auto",
    *,
    devices: Sequence[str] | None = None,
    communication: str = "auto",
    tpu: str | None = None,
    timeout: float = 300.0,
) -> tf.distribute.Strategy:
    """Makes the `tf.distribute` strategy for the devices and workers that are here.

    Models, optimizers and metrics are made, and compiled, in its scope: `with strategy.scope(): ...`. After it,
    `keras_mp.set_policy("auto")` chooses for its devices. Call it before anything is computed where there are several
    workers, as TensorFlow asks.

    Args:
        kind: `"auto"`: a TPU where one answers, `"multiworker"` where `TF_CONFIG` or SLURM says that there are several
            workers, `"mirrored"` where there are several GPUs (or several `devices` are named), else `"default"`.
            `"default"`: TensorFlow's own, one device.
            `"mirrored"`: a replica on each of several devices of this machine.
            `"multiworker"`: replicas in several processes, on several machines, that `TF_CONFIG` or SLURM names.
            `"tpu"`: the cores of a TPU.
        devices: for `"mirrored"`, those to use, such as `["GPU:0", "GPU:1"]`; all GPUs without it.
        communication: between workers: `"nccl"` (GPUs), `"ring"`, or `"auto"` for what suits them.
        tpu: the TPU's name or address; without it the one in this machine, or that the environment names.
        timeout: how many seconds to wait for the other workers.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ArgumentError: for a kind, device or communication that does not exist, or an argument that does not go with the
            kind.
        DistributionError: where what was asked for is not here, `TF_CONFIG` is wrong, or a worker does not answer.

    Example:
        >>> import keras, keras_mp
        >>> strategy = keras_mp.strategy("default")
        >>> with strategy.scope():
        ...     model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        ...     model.compile("sgd", "mse")
    """
    if kind not in _KINDS:
        raise ArgumentError(f"strategy({kind!r}): expected one of {', '.join(map(repr, _KINDS))}.")
    if communication not in _COMMUNICATION:
        raise ArgumentError(
            f"strategy(communication={communication!r}): expected one of {', '.join(map(repr, _COMMUNICATION))}."
        )
    if devices is not None and kind not in ("auto", "mirrored"):
        raise ArgumentError(f'strategy({kind!r}) takes no `devices`: they are for "mirrored". Received: {devices!r}')
    if tpu is not None and kind not in ("auto", "tpu"):
        raise ArgumentError(f'strategy({kind!r}) takes no `tpu`: it is for "tpu". Received: tpu={tpu!r}')
    if kind == "auto":
        kind = _kind_for_what_is_here(devices, tpu)
    if kind == "tpu":
        made = _tpu(tpu)
    elif kind == "multiworker":
        made = _multi_worker(communication, timeout)
    elif kind == "mirrored":
        made = tf_replicas.mirrored_strategy(_devices(devices))
    else:
        made = tf.distribute.get_strategy()
    hardware.remember(made)
    return made


def _kind_for_what_is_here(devices: Sequence[str] | None, tpu: str | None) -> str:
    if devices is not None:
        return "mirrored"
    if tpu or tf.config.list_physical_devices("TPU") or any(os.environ.get(name) for name in _TPU_VARIABLES):
        return "tpu"
    found = cluster.from_environment()
    if (found and len(found.addresses) > 1) or (not found and cluster.is_slurm_job()):
        return "multiworker"
    return "mirrored" if len(tf.config.get_visible_devices("GPU")) > 1 else "default"


def _devices(asked: Sequence[str] | None) -> list[str]:
    gpus = [device.name for device in tf.config.list_logical_devices("GPU")]
    if asked is None:
        if not gpus:
            raise DistributionError(
                'strategy("mirrored"): TensorFlow sees no GPU here. Name the devices, for example '
                'devices=["CPU:0", "CPU:1"] of logical CPU devices, or use strategy("default").'
            )
        return gpus
    if isinstance(asked, str) or not asked:
        raise ArgumentError(f'strategy(devices={asked!r}): expected a list, such as ["GPU:0", "GPU:1"].')
    here = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    names = [name.upper().removeprefix("/").removeprefix("DEVICE:") for name in asked]
    missing = [name for name in names if name not in here]
    if missing or len(set(names)) < len(names):
        what = f"{missing[0]!r} is not here" if missing else "a device is named twice"
        raise DistributionError(
            f"strategy(devices={list(asked)!r}): {what}. TensorFlow has {', '.join(here)}. Several logical devices are "
            "made of one by tf.config.set_logical_device_configuration, before anything is computed."
        )
    return names


def _multi_worker(communication: str, timeout: float) -> tf.distribute.Strategy:
    options = tf.distribute.experimental.CommunicationOptions(implementation=_COMMUNICATION[communication])
    found = cluster.from_environment()
    if found is None and not cluster.is_slurm_job():
        raise DistributionError(
            'strategy("multiworker"): neither TF_CONFIG nor SLURM says which workers there are. Set TF_CONFIG on each, '
            "or start them on this machine by `keras-mp launch --workers 2 script.py`."
        )
    if found is None:
        resolver = tf.distribute.cluster_resolver.SlurmClusterResolver()
        spec = resolver.cluster_spec().as_dict()
        found = cluster.Cluster({job: tuple(each) for job, each in spec.items()}, *resolver.get_task_info())
    else:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if runtime.runtime_started():
        raise DistributionError(
            'strategy("multiworker") was called after TensorFlow had computed something, when it takes no workers any '
            "more. Call it at the start of the program, after the imports and tf.config settings."
        )
    cluster.wait_for(found, timeout)
    return tf.distribute.MultiWorkerMirroredStrategy(resolver, options)


def _tpu(name: str | None) -> tf.distribute.Strategy:
    here = tf.config.list_physical_devices("TPU")
    if name is None and not here and not any(os.environ.get(each) for each in _TPU_VARIABLES):
        kinds = ", ".join(sorted({device.device_type for device in tf.config.list_physical_devices()}))
        raise DistributionError(
            f'strategy("tpu"): TensorFlow sees no TPU here ({kinds} only), and none of {", ".join(_TPU_VARIABLES)} '
            'names one. On a Cloud TPU machine install the extra: pip install "keras-mp[tpu]"; or name it: '
            'strategy("tpu", tpu="my-tpu").'
        )
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(name or ("local" if here else ""))
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, OSError, tf.errors.OpError) as error:
        raise DistributionError(
            f'strategy("tpu"): the TPU {name or "that the environment names"} does not answer. TensorFlow says: {error}'
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def require_one_strategy(model: keras.Model, optimizer: keras.optimizers.Optimizer | None) -> None:
    """Checks that model and optimizer were made under one strategy, and that no other is in force.

    Args:
        model: a Keras model.
        optimizer: its optimizer, or None for none.

    Raises:
        DistributionError: with what was made where, and what to type.
    """
    here = tf.distribute.get_strategy() if tf.distribute.has_strategy() else None
    own = tf_replicas.strategy_of(model)
    if here is not None and here is not own:
        raise DistributionError(
            f"{_words(here)} is in force, and {model.name!r} was made {'outside it' if own is None else _under(own)}. "
            "Make the model, its optimizer and its metrics, and call `compile`, inside `with strategy.scope():` of the "
            "strategy that is to train it."
        )
    theirs = own if optimizer is None else tf_replicas.strategy_of(optimizer)
    if theirs is not own:
        raise DistributionError(
            f"The optimizer was made {_under(theirs)}, and {model.name!r} {_under(own)}. Make both inside "
            "`with strategy.scope():` of one strategy."
        )
    if own is not None:
        _require_made_under(own, model.variables)


def _under(strategy: tf.distribute.Strategy | None) -> str:
    return "outside any strategy's scope" if strategy is None else f"under {_words(strategy)}"


def _words(strategy: tf.distribute.Strategy) -> str:
    count = strategy.num_replicas_in_sync
    return f"a {type(strategy).__name__} of {count} replica{'s' * (count != 1)}"


def rows_of_replicas(strategy: tf.distribute.Strategy, batch: Any) -> list[int]:
    """How many rows of a batch each replica has; the same answer on every worker, all of which must ask.

    Args:
        strategy: what the batch was distributed by.
        batch: nested structure of what a distributed dataset's iterator gives.
    """
    first = next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None)
    rows = [int(keras.ops.shape(value)[0]) for value in strategy.experimental_local_results(first)]
    if len(rows) == strategy.num_replicas_in_sync:
        return rows
    mine = iter(rows)
    values = strategy.experimental_distribute_values_from_function(lambda _: tf.constant([next(mine)]))
    return strategy.gather(values, axis=0).numpy().tolist()


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
    context, sums = tf.distribute.get_replica_context(), list(values)
    # In one collective for each dtype: workers pack tensors into one, which those of several dtypes do not fit into.
    for dtype in dict.fromkeys(value.dtype for value in values if value is not None):
        places = [place for place, value in enumerate(values) if value is not None and value.dtype == dtype]
        reduced = context.all_reduce(tf.distribute.ReduceOp.SUM, [_gatherable(values[place]) for place in places])
        for place, value in zip(places, reduced, strict=True):
            sums[place] = _with_values(value, tf.bitcast(value.values, dtype)) if value.dtype != dtype else value
    return sums


def _gatherable(value: "tf.Tensor | tf.IndexedSlices") -> "tf.Tensor | tf.IndexedSlices":
    """A value as it can be sent: sparse ones are not added up but gathered, for which TensorFlow knows no bfloat16.

    Their bits are sent as those of float16, which nothing computes with.
    """
    if not isinstance(value, tf.IndexedSlices) or value.dtype != tf.bfloat16:
        return value
    if isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy):
        return value  # it does add them up, and knows bfloat16
    return _with_values(value, tf.bitcast(value.values, tf.float16))


def _with_values(slices: tf.IndexedSlices, values: tf.Tensor) -> tf.IndexedSlices:
    return tf.IndexedSlices(values, slices.indices, slices.dense_shape)


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


def share_of_batch(rows: "int | tf.Tensor") -> tuple["tf.Tensor | None", tf.Tensor]:
    """How much of the batch this replica has.

    Args:
        rows: how many rows this replica has: a Python int, if that is known when a graph is traced, or an int scalar.

    Returns:
        The share, a float32 scalar between 0 and 1, or None where there is one replica; and how many rows the batch has
        on all of them, an int64 scalar.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    known = isinstance(rows, int) and not tf.executing_eagerly()
    rows = tf.cast(rows, tf.int64)
    if replicas == 1:
        return None, rows
    if known:  # the shape in a graph is static only where no replica can have fewer rows
        return tf.constant(1.0 / replicas), rows * replicas
    (total,) = sum_over_replicas([rows])
    return tf.cast(tf.math.divide_no_nan(tf.cast(rows, tf.float64), tf.cast(total, tf.float64)), tf.float32), total


def assign_from_replicas(state: "Sequence[tuple[keras.Variable, tf.Tensor]]", share: "tf.Tensor | None") -> None:
    """Assigns what each replica's layers would have assigned, so that the copies of a variable stay equal.

    Each float variable becomes the mean of what the replicas have for it, weighted by their rows; a value that is not
    finite on any of them leaves it as it was, as a step does that the optimizer skips. Integers are the same on all
    replicas: counters, seeds. Variables with an aggregation of their own, as those of metrics, are left to TensorFlow.

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
    # An empty replica's statistics may be NaN, and say nothing.
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
    optimizer: keras.optimizers.Optimizer, gradients: Sequence[Any], variables: Sequence[keras.Variable]
) -> None:
    """Takes a step of a Keras optimizer with the sum of all replicas' gradients, as one device would.

    Called by itself under a strategy, Keras's optimizer clips each replica's own gradient, and fails where it
    accumulates gradients or overwrites weights with their averages.

    Args:
        optimizer: any but those that add up over replicas by themselves.
        gradients: this replica's, one for each variable.
        variables: what to update.
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
        with tf_replicas.without_all_reduce(optimizers):
            program(*arguments)
        return
    _require_made_under(strategy, variables)
    devices = strategy.extended.worker_devices
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        # Each replica runs on its own, as several GPUs under XLA do.
        with tf_replicas.one_device(devices.index(context.devices[0]), variables, optimizers):
            program(*arguments)
        return

    def on_all_devices(strategy: tf.distribute.Strategy, arguments: Any) -> None:
        for index, device in enumerate(devices):
            local = tf.nest.map_structure(lambda value: _local(strategy, value, index), arguments)  # noqa: B023
            with tf.device(device), tf_replicas.one_device(index, variables, optimizers):
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
