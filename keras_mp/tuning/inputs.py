"""What `tune` is given: checked, and put in one form."""

import re
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import runtime
from keras_mp.errors import ArgumentError, DistributionError
from keras_mp.policies.policy import chosen_policy
from keras_mp.tuning import findings

__all__ = ["Data", "choices", "described", "policies", "require_trainable"]

_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


class Data:
    """The batch that all candidates train on, and the dataset that it is from, if it is.

    Args:
        batch: `(x, y)` or `(x, y, sample_weight)`, or a `tf.data.Dataset` of them.

    Attributes:
        dataset: what was given, or None.
        first: the batch.
        cached: an iterator over that batch, again and again.
        rows: how many it has.
        x: the inputs.

    Raises:
        ArgumentError: for an empty dataset, a batch without rows, and one that is none.
    """

    def __init__(self, batch: Any) -> None:
        self.dataset: tf.data.Dataset | None = None
        if isinstance(batch, tf.data.Dataset):
            self.dataset = batch
            once = batch.take(1).cache()
            elements = list(once)  # a cache is one when it was read to its end
            if not elements:
                raise ArgumentError("tune(): the dataset has no batch. Give it data, and batch it: dataset.batch(32).")
            self.first = elements[0]
            cached = once.repeat()
        else:
            self.first = _as_batch(batch)
            cached = tf.data.Dataset.from_tensors(self.first).repeat()
        # One for all candidates: each iterator has a copy of all functions that TensorFlow knows by then, which takes
        # seconds to let go.
        self.cached = iter(cached.prefetch(2))
        leaves = [leaf for leaf in keras.tree.flatten(self.first) if leaf is not None]
        rows = {leaf.shape[0] if len(leaf.shape) else -1 for leaf in leaves}
        if rows == {0}:
            raise ArgumentError("tune(): the batch has no rows. Give it a batch of the size that is trained with.")
        if len(rows) != 1 or -1 in rows:
            shapes = findings.listed([str(tuple(leaf.shape)) for leaf in leaves])
            raise ArgumentError(
                "tune(): all parts of a batch need the same number of rows. Received arrays of shapes "
                f"{shapes}. Give (x, y) with a row of y for each of x, batch a dataset: "
                "dataset.batch(32), and make arrays of lists, which are structures here: np.array(x)."
            )
        self.rows: int = rows.pop()
        self.x = keras.utils.unpack_x_y_sample_weight(self.first)[0]


def require_trainable(model: Any, budget: float) -> None:
    """Refuses what has no training step to time here.

    Args:
        model: what is to be tuned.
        budget: seconds.

    Raises:
        ArgumentError: for what is no compiled model, one that runs eagerly, and a budget that is no number above 0.
        DistributionError: for a model with several replicas.
    """
    if not isinstance(model, keras.Model):
        raise ArgumentError(
            f"tune() takes a compiled keras.Model. Received: {model!r} of type {type(model).__name__}. For a file type "
            "tune(keras_mp.load_model(path), batch)."
        )
    if not model.compiled or model.optimizer is None:
        raise ArgumentError(
            f"tune(): {model.name!r} is not compiled, so that there is no step to time. Type "
            'model.compile("adam", loss) with the loss that it is to be trained with, and call tune again.'
        )
    if model.run_eagerly:
        raise ArgumentError(
            f"tune(): {model.name!r} runs eagerly, op by op, where no compiler is at work. Type "
            "model.compile(..., run_eagerly=False)."
        )
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1:
        raise DistributionError(
            f"tune(): {model.name!r} has {replicas} replicas, and the step of one is timed. Make the model outside "
            "strategy.scope(), tune it on the batch of one replica, and use what is recommended in the scope."
        )
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ArgumentError(f"tune(budget={budget!r}): expected a number of seconds above 0, such as budget=60.")


def choices(name: str, given: Any, kind: type) -> list[Any]:
    """One or several values of an argument as a list, each once; empty for None.

    Args:
        name: of the argument.
        given: its value.
        kind: bool, or int for whole numbers from 1 on.

    Raises:
        ArgumentError: for values of another kind, and none at all.
    """
    several: list[Any] = [] if given is None else list(given) if isinstance(given, (list, tuple, set)) else [given]
    for each in several:
        is_bool = isinstance(each, bool)
        if not (is_bool if kind is bool else isinstance(each, int) and not is_bool and each > 0):
            example = "True, False or (True, False)" if kind is bool else "a whole number from 1 on, or such as (1, 16)"
            raise ArgumentError(f"tune({name}={given!r}): expected {example}.")
    if given is not None and not several:
        raise ArgumentError(f"tune({name}={given!r}): expected at least one to try. Leave it out to try all.")
    return list(dict.fromkeys(several))


def policies(given: Any) -> dict[str, keras.DTypePolicy]:
    """The policies to try, by their names.

    Args:
        given: one or several, as `set_policy` takes them; None for float32 and both mixed ones.

    Raises:
        ArgumentError: for none at all.
        PolicyError: for one that does not exist.
    """
    several = _POLICIES if given is None else given if isinstance(given, (list, tuple, set)) else [given]
    if not several:
        raise ArgumentError(f"tune(policies={given!r}): expected at least one to try. Leave it out to try all.")
    remapper = runtime.remapper_enabled()
    try:
        found = [chosen_policy(each, "tune(model, batch, policies=[{}])") for each in several]
    finally:
        runtime.set_remapper(remapper)  # off for float16 on a CPU, which each copy sees to itself
    return {policy.name: policy for policy in found}


def _as_batch(batch: Any) -> tuple[Any, ...]:
    if not isinstance(batch, (tuple, list)) or not 1 <= len(batch) <= 3:
        raise ArgumentError(
            f"tune(): expected a batch (x, y) or (x, y, sample_weight), or a tf.data.Dataset of them. Received: "
            f"{described(batch)}. For a model that takes x alone type (x,); of a PyDataset or a generator give one "
            "batch: dataset[0] or next(generator)."
        )

    def array(leaf: Any) -> Any:
        if leaf is None or tf.is_tensor(leaf):
            return leaf
        leaf = np.asarray(leaf)
        if leaf.dtype.kind in "OSU":
            raise ArgumentError(
                f"tune(): a batch is of numbers. Received {leaf.dtype}, such as {leaf.ravel()[:1].tolist()}. Make "
                "numbers of it as for fit, or give a tf.data.Dataset whose map does."
            )
        # As `fit` does it.
        return leaf.astype(keras.config.floatx()) if leaf.dtype == np.float64 else leaf

    batch = keras.tree.map_structure(array, keras.tree.lists_to_tuples(tuple(batch)))
    while len(batch) > 1 and batch[-1] is None:
        batch = batch[:-1]
    return batch


def described(batch: Any) -> str:
    """Dtypes and shapes of a batch, in its structure.

    Args:
        batch: of arrays, tensors or anything else.

    Example:
        >>> described((np.ones((2, 3)), [1]))
        '(float64(2, 3), [int])'
    """

    def leaf(value: Any) -> str:
        shape = getattr(value, "shape", None)
        return (
            type(value).__name__ if shape is None else f"{keras.backend.standardize_dtype(value.dtype)}{tuple(shape)}"
        )

    return re.sub(r"'(\w+\([^']*\)|\w+)'", r"\1", repr(keras.tree.map_structure(leaf, batch)))
