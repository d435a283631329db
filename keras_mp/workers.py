"""The workers of a multi-worker job: which is the chief, which callbacks run where, what to say when one is lost."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp import distribution

__all__ = ["callbacks_here", "explain_loss", "is_chief", "is_one_of_several"]

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
    """Whether this process is the one that writes files for all: the chief, or the first worker; True for one alone."""
    if not is_one_of_several(strategy):
        return True
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().jobs
    return resolver.task_type == "chief" or ("chief" not in jobs and resolver.task_id == 0)


def callbacks_here(callbacks: Any, strategy: tf.distribute.Strategy) -> Any:
    """The callbacks that this worker runs: all, but those that write files only on the chief.

    Where one of them restores a backup, all workers begin with the chief's weights, optimizer and epoch, also where
    they cannot read its files.

    Args:
        callbacks: as for `fit`.
        strategy: a multi-worker one.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    given = list(keras.tree.flatten(callbacks)) if callbacks is not None else []
    here = [each for each in given if is_chief(strategy) or not isinstance(each, _WRITERS)]
    if any(isinstance(each, keras.callbacks.BackupAndRestore) for each in given):
        here.append(_StartLikeTheChief(strategy))
    return here


def explain_loss(error: tf.errors.OpError, strategy: tf.distribute.Strategy) -> str | None:
    """What to tell the user where an error says that another worker is gone; None for other errors."""
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


class _StartLikeTheChief(keras.callbacks.Callback):
    """Gives all workers what the chief has, when the callbacks before it have restored it."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self._strategy = strategy

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        variables = {id(v): v for v in [*model.variables, *model.optimizer.variables]}
        epoch = tf.constant(model._initial_epoch or 0, tf.int64)
        values = [tf.convert_to_tensor(variable.value) for variable in variables.values()]
        *values, epoch = self._from_chief([*values, epoch])
        for variable, value in zip(variables.values(), values, strict=True):
            variable.assign(value)
        model._initial_epoch = int(epoch)

    def _from_chief(self, values: list[tf.Tensor]) -> list[tf.Tensor]:
        strategy, here = self._strategy, is_chief(self._strategy)

        @tf.function(autograph=False)
        def share(values: list[tf.Tensor]) -> Any:
            def on_replica() -> Any:
                # The first replica of all is the chief's.
                gives = here and tf.distribute.get_replica_context().replica_id_in_sync_group == 0
                return distribution.sum_over_replicas([tf.where(gives, v, tf.zeros_like(v)) for v in values])

            return strategy.run(on_replica)

        return [strategy.experimental_local_results(value)[0] for value in share(values)]
