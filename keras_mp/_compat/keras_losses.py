"""Keras's losses of a replica's rows, weighted by the share of the batch that those rows are."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# Keras means a replica's losses by its own rows and divides by the number of replicas, and has no way to say otherwise;
# `share_of_batch` does.
from keras.src.losses import loss as _loss

__all__ = [
    "install",
    "share_of_batch",
]

# Keras multiplies each mean over a replica's rows, in a loss and in `add_loss`, by one over the number of replicas. The
# sum is the mean over the whole batch only where all replicas have as many rows, and not where `compute_loss` or a loss
# is a function of one's own that answers with a mean. So here means stay what they are, and the total is weighted.
_share: contextvars.ContextVar["tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]] | None"] = contextvars.ContextVar(
    "_share", default=None
)


_keras_apply_mask = _loss.apply_mask


_keras_reduce_values = _loss.reduce_values


_keras_scale_loss_for_distribution = _loss.scale_loss_for_distribution


_keras_unscale_loss_for_distribution = _loss.unscale_loss_for_distribution


def _as_of_the_batch(divisor: Any) -> Any:
    """What a mean is to be multiplied by that was divided by a number of this replica's, not of the whole batch."""
    share, total_of = _share.get() or (None, None)
    if share is None or total_of is None:
        return tf.ones([], divisor.dtype)
    return tf.math.divide_no_nan(divisor, total_of(tf.stop_gradient(divisor)) * tf.cast(share, divisor.dtype))


def _apply_mask(sample_weight: Any, mask: Any, dtype: Any, reduction: Any) -> Any:
    weights = _keras_apply_mask(sample_weight, mask, dtype, reduction)
    if _share.get() is None or mask is None or reduction not in ("mean", "sum_over_batch_size"):
        return weights
    return weights * tf.cast(_as_of_the_batch(tf.reduce_sum(tf.cast(mask, tf.float32))), weights.dtype)


def _reduce_values(values: Any, sample_weight: Any = None, reduction: str | None = "sum_over_batch_size") -> Any:
    loss = _keras_reduce_values(values, sample_weight, reduction)
    if (given := _share.get()) is None:
        return loss
    if reduction == "sum":
        return tf.math.divide_no_nan(loss, tf.cast(given[0], loss.dtype))
    if reduction == "mean_with_sample_weight" and sample_weight is not None:
        return loss * _as_of_the_batch(tf.reduce_sum(tf.cast(sample_weight, loss.dtype)))
    return loss


def _scale_loss_for_distribution(value: Any) -> Any:
    return _keras_scale_loss_for_distribution(value) if _share.get() is None else value


def _unscale_loss_for_distribution(value: Any) -> Any:
    """What the trackers of single losses take the mean of, over replicas as over batches."""
    if (given := _share.get()) is None:
        return _keras_unscale_loss_for_distribution(value)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return value * tf.cast(given[0] * replicas, value.dtype)


@contextlib.contextmanager
def share_of_batch(share: tf.Tensor | None, total_of: Callable[[tf.Tensor], tf.Tensor]) -> Iterator[None]:
    """Inside, Keras's losses are those of a replica's rows, to be multiplied by the share of the batch that those are.

    The sum of that over replicas is then the mean over the whole batch, also where one has fewer rows than another, and
    where the mean is one over the elements that a mask leaves, or over the sum of the weights. A loss with
    `reduction="sum"` is divided by the share, so that it is the sum in the end.

    Args:
        share: scalar, between 0 and 1; the shares of all replicas add up to 1. None leaves it to Keras.
        total_of: from a float scalar of this replica to the sum over all replicas.
    """
    token = _share.set(None if share is None else (share, total_of))
    try:
        yield
    finally:
        _share.reset(token)


def install() -> None:
    """Puts the functions above in the place of Keras's."""
    _loss.apply_mask = _apply_mask
    _loss.reduce_values = _reduce_values
    _loss.scale_loss_for_distribution = _scale_loss_for_distribution
    _loss.unscale_loss_for_distribution = _unscale_loss_for_distribution
