"""The first batch of a training over several replicas."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_models
from keras_mp.distribution import strategies
from keras_mp.errors import DistributionError

__all__ = ["first_of_replica"]


def first_of_replica(strategy: tf.distribute.Strategy, iterator: Any, data_batch: Any, *, checks: bool) -> Any:
    """The rows of the first replica, of the first batch, to build a model by.

    Args:
        strategy: that the model was made in.
        iterator: Keras's, over the batches; or None.
        data_batch: a batch, where there is no iterator.
        checks: whether the batch has to divide among the replicas.
    """
    peeked = None if iterator is None else keras_models.first_of_generator(iterator)
    if peeked is not None:
        replicas, size = strategy.num_replicas_in_sync, keras.ops.shape(keras.tree.flatten(peeked)[0])[0]
        rows = [size // replicas + (index < size % replicas) for index in range(replicas)]
    elif iterator is not None:
        for _, _, batches in iterator:
            data_batch = next(batches)
            break
        rows = strategies.rows_of_replicas(strategy, data_batch)
    if iterator is not None and checks:
        _require_even_batch(rows, iterator.num_batches)
    if peeked is None:
        peeked = keras.tree.map_structure(
            lambda value: None if value is None else strategy.experimental_local_results(value)[0], data_batch
        )
    return peeked


def _require_even_batch(rows: list[int], batches: "int | None") -> None:
    """Raises an error for a batch that does not divide among the replicas.

    Args:
        rows: how many rows each replica has of the first batch.
        batches: how many batches there are, or None where that is unknown.
    """
    replicas, size = len(rows), sum(rows)
    if size < replicas:
        raise DistributionError(
            f"The first batch has {size} row{'s' * (size != 1)} for {replicas} replicas, so that some would have "
            f"none. Make batches of at least {replicas} rows: a batch is that of all replicas, and "
            f"batch_size={replicas} gives each of them one."
        )
    if len(set(rows)) > 1 and batches != 1:
        below, above = size // replicas * replicas, -(-size // replicas) * replicas
        raise DistributionError(
            f"A batch of {size} rows does not divide among {replicas} replicas: they would have {rows}. Make it "
            f"batch_size={below} or batch_size={above}, of which each has as many. Only the last batch of an epoch "
            "may be uneven."
        )
