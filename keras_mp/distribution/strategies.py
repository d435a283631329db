"""The `tf.distribute` strategy for the devices and workers here, and checks that a model is in its scope."""

import os
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import runtime, tf_replicas
from keras_mp.distribution import cluster, replicas
from keras_mp.errors import ArgumentError, DistributionError

__all__ = ["require_one_strategy", "rows_of_replicas", "strategy"]


_KINDS = ("auto", "default", "mirrored", "multiworker", "tpu")
_COMMUNICATION = {
    "auto": tf.distribute.experimental.CommunicationImplementation.AUTO,
    "nccl": tf.distribute.experimental.CommunicationImplementation.NCCL,
    "ring": tf.distribute.experimental.CommunicationImplementation.RING,
}
# Environment variables that announce a Cloud TPU outside this machine.
_TPU_VARIABLES = ("TPU_NAME", "COLAB_TPU_ADDR", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS")


def strategy(
    kind: str = "auto",
    *,
    devices: Sequence[str] | None = None,
    communication: str = "auto",
    tpu: str | None = None,
    timeout: float = 300.0,
) -> tf.distribute.Strategy:
    """Makes the `tf.distribute` strategy for the devices and workers here.

    Make and compile models, optimizers and metrics in its scope: `with strategy.scope(): ...`. Afterwards
    `keras_mp.set_policy("auto")` chooses for its devices. With several workers, call it before anything is computed, as
    TensorFlow requires.

    Args:
        kind: `"auto"` takes the first of these that is here: `"tpu"`, `"multiworker"`, `"mirrored"` (several GPUs, or
            `devices` are named), `"default"`.
            `"default"`: TensorFlow's default strategy, one device.
            `"mirrored"`: a replica on each of several devices of this machine.
            `"multiworker"`: replicas in several processes or machines, as `TF_CONFIG` or SLURM names them.
            `"tpu"`: the cores of a TPU.
        devices: the devices of `"mirrored"`, such as `["GPU:0", "GPU:1"]`. By default all GPUs.
        communication: between workers: `"nccl"` (GPUs), `"ring"`, or `"auto"` for TensorFlow's choice.
        tpu: the TPU's name or address. By default the TPU in this machine, or the one that the environment names.
        timeout: the seconds to wait for the other workers.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ArgumentError: for an unknown kind, device or communication, or an argument that does not fit the kind.
        DistributionError: the devices are not here, `TF_CONFIG` is wrong, or a worker does not respond.

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
    """Checks that a model and its optimizer were made under one strategy, and that no other is in force.

    Args:
        model: a Keras model.
        optimizer: its optimizer, or None for none.

    Raises:
        DistributionError: with the strategy of each, and the code to type.
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
        replicas.require_made_under(own, model.variables)


def _under(strategy: tf.distribute.Strategy | None) -> str:
    return "outside any strategy's scope" if strategy is None else f"under {_words(strategy)}"


def _words(strategy: tf.distribute.Strategy) -> str:
    count = strategy.num_replicas_in_sync
    return f"a {type(strategy).__name__} of {count} replica{'s' * (count != 1)}"


def rows_of_replicas(strategy: tf.distribute.Strategy, batch: Any) -> list[int]:
    """Returns how many rows of a batch each replica has. All workers must call it and get the same result.

    Args:
        strategy: the strategy that distributed the batch.
        batch: nested structure of values from a distributed dataset's iterator.
    """
    first = next(leaf for leaf in keras.tree.flatten(batch) if leaf is not None)
    rows = [int(keras.ops.shape(value)[0]) for value in strategy.experimental_local_results(first)]
    if len(rows) == strategy.num_replicas_in_sync:
        return rows
    mine = iter(rows)
    values = strategy.experimental_distribute_values_from_function(lambda _: tf.constant([next(mine)]))
    return strategy.gather(values, axis=0).numpy().tolist()
