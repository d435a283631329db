"""The workers of a multi-worker job: the chief, the callbacks of each, and the error for a lost worker."""

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import keras_layers, keras_models
from keras_mp.distribution import replicas
from keras_mp.errors import DistributionError
from keras_mp.policies import policy

__all__ = ["callbacks_here", "explain_loss", "is_chief", "is_one_of_several", "require_alike"]

# A form in which `fit` takes callbacks.
_Callbacks: TypeAlias = "keras.callbacks.Callback | keras.callbacks.CallbackList | Sequence[keras.callbacks.Callback]"

# They write files that all workers would write at once.
_WRITERS = (
    keras.callbacks.BackupAndRestore,
    keras.callbacks.CSVLogger,
    keras.callbacks.ModelCheckpoint,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TensorBoard,
)

# How TensorFlow words that a collective operation found no peer, in errors of several types.
_SIGNS_OF_LOSS = (
    "Connection reset by peer",
    "Connection refused",
    "Socket closed",
    "failed to connect to all addresses",
    "Collective ops is aborted",
    "Broken pipe",
    "heartbeat",
    "GOAWAY",
)


def is_one_of_several(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process is one of several workers that train together."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and bool(
        len(strategy.cluster_resolver.cluster_spec().as_dict())
    )


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the files for all: it is the chief, the first worker or the only one."""
    if not is_one_of_several(strategy):
        return True
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or ("chief" not in jobs and resolver.task_id == 0)


def callbacks_here(
    callbacks: "_Callbacks | None", strategy: tf.distribute.Strategy
) -> keras.callbacks.CallbackList | list[keras.callbacks.Callback]:
    """Returns the callbacks that this worker runs. Only the chief runs callbacks that write files.

    Where one of them restores a backup, all workers begin with the chief's weights, optimizer and epoch. They need not
    be able to read its files.

    Args:
        callbacks: as for `fit`.
        strategy: a multi-worker one.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    given: list[keras.callbacks.Callback] = list(keras.tree.flatten(callbacks)) if callbacks is not None else []
    here = [each for each in given if is_chief(strategy) or not isinstance(each, _WRITERS)]
    if any(isinstance(each, keras.callbacks.BackupAndRestore) for each in given):
        here.append(_StartLikeTheChief(strategy))
    return here


def explain_loss(error: tf.errors.OpError, strategy: tf.distribute.Strategy) -> str | None:
    """Returns a message for the user if an error says that another worker is gone, else None."""
    if not is_one_of_several(strategy) or not any(sign in str(error) for sign in _SIGNS_OF_LOSS):
        return None
    resolver = strategy.cluster_resolver
    spec = resolver.cluster_spec().as_dict()
    return (
        f"This is {resolver.task_type} {resolver.task_id} of {spec}, and another worker does not answer any more: its "
        "process has ended or its machine cannot be reached, so that the gradients cannot be added up. Look for the "
        "first error in the other workers' logs, and start all of them again; with "
        "keras.callbacks.BackupAndRestore(folder) among the callbacks of `fit` they go on where the last backup was "
        f"made. TensorFlow says: {error.message}"
    )


def require_alike(model: keras.Model, strategy: tf.distribute.Strategy, scaling: str) -> None:
    """Refuses a model whose policies or loss scaling differ between workers: their gradients cannot be added up.

    All workers have to call it. One alone passes.

    Args:
        model: the built model. Names of layers may differ, because each process numbers them.
        strategy: the strategy that trains it.
        scaling: how its loss is scaled, in words.

    Raises:
        DistributionError: on every worker, with the policies or the scaling of each.
    """
    if not is_one_of_several(strategy):
        return
    layers = [layer for layer, _ in keras_layers.paths_of_layers(model)]
    here = [[layer.dtype_policy.name, layer.compute_dtype, layer.variable_dtype] for layer in layers]
    everywhere = {worker: json.loads(text) for worker, text in _texts(strategy, json.dumps([scaling, here])).items()}
    scalings = {worker: each for worker, (each, _) in everywhere.items()}
    policies = {worker: each for worker, (_, each) in everywhere.items()}
    counts = {worker: f"{len(each)} layers" for worker, each in policies.items()}
    if _differ(counts):
        what, has = f"The model {model.name!r} is not the same on all workers", counts
    elif _differ(policies):
        places = [place for place in range(len(layers)) if _differ({w: each[place] for w, each in policies.items()})]
        # A model and its inputs compute nothing. The layer that the user looks for has weights.
        computing = [
            place for place in places if layers[place].weights and not keras_layers.inner_layers(layers[place])
        ]
        place = (computing or places)[0]
        layer = layers[place]
        has = {worker: each[place][0] for worker, each in policies.items()}
        what = f"The workers have other dtype policies for {layer.name!r} ({type(layer).__name__})"
    elif _differ(scalings):
        has, what = scalings, f"The workers differ in the loss scaling of {model.name!r}"
    else:
        return
    raise DistributionError(
        f"{what}: {'; '.join(f'{worker} has {each}' for worker, each in has.items())}. Their gradients cannot be added "
        'up. Make and compile the model alike on all of them: type keras_mp.set_policy("mixed_bfloat16") before it, or '
        'set_policy("auto") in the scope of the strategy, which takes the chief\'s answer.'
    )


def _differ(by_worker: dict[str, Any]) -> bool:
    first, *others = by_worker.values()
    return any(each != first for each in others)


def _texts(strategy: tf.distribute.Strategy, text: str) -> dict[str, str]:
    """Returns the text of each worker, by the worker's name. All workers have to call it."""
    resolver = strategy.cluster_resolver
    spec = resolver.cluster_spec().as_dict()
    names = [f"{job} {index}" for job in ("chief", "worker") for index in range(len(spec.get(job, ())))]
    row = names.index(f"{resolver.task_type} {resolver.task_id}")
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = np.zeros(len(names), "int32")
    lengths[row] = len(content)
    (lengths,) = (each.numpy() for each in _summed(strategy, [tf.constant(lengths)], True))
    table = np.zeros((len(names), lengths.max()), "int32")
    table[row, : len(content)] = content
    (table,) = (each.numpy().astype(np.uint8) for each in _summed(strategy, [tf.constant(table)], True))
    return {name: line[:length].tobytes().decode() for name, line, length in zip(names, table, lengths, strict=True)}


_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def _chiefs_choice(name: str) -> str:
    """Returns the policy that the chief's hardware recommends. All workers have to call it."""
    strategy = hardware.strategy_in_use()
    if not is_one_of_several(strategy):
        return name
    index = tf.constant(_POLICIES.index(name), tf.int32)
    (index,) = _summed(strategy, [index], is_chief(strategy))
    return _POLICIES[int(index)]


policy.agree_on_auto(_chiefs_choice)


def _summed(strategy: tf.distribute.Strategy, values: list[tf.Tensor], gives: bool) -> list[tf.Tensor]:
    """Returns the sums of the values from those workers whose `gives` is true."""

    @tf.function(autograph=False)
    def share(values: list[tf.Tensor]) -> list[tf.Tensor]:
        def on_replica() -> list[tf.Tensor]:
            # The first replica of a worker gives its values.
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            first = tf.equal(replica % len(strategy.extended.worker_devices), 0)
            shared = [tf.where(tf.logical_and(gives, first), v, tf.zeros_like(v)) for v in values]
            return replicas.sum_over_replicas(shared)

        return strategy.run(on_replica)

    return [strategy.experimental_local_results(value)[0] for value in share(values)]


class _StartLikeTheChief(keras.callbacks.Callback):
    """Gives all workers the chief's state, after the callbacks before it have restored that."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        model = self.model
        variables = {id(v): v for v in [*model.variables, *model.optimizer.variables]}
        epoch = tf.constant(keras_models.initial_epoch(model), tf.int64)
        values = [tf.convert_to_tensor(variable.value) for variable in variables.values()]
        strategy = self._strategy
        *values, epoch = _summed(strategy, [*values, epoch], is_chief(strategy))
        for variable, value in zip(variables.values(), values, strict=True):
            variable.assign(value)
        keras_models.set_initial_epoch(model, int(epoch))
