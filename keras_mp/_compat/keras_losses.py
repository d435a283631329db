"""Keras's losses on a replica's rows, weighted by the replica's share of the batch."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

# Keras takes the mean over a replica's own rows and divides it by the number of replicas. No public name changes that.
from keras.src.losses import loss as _loss

from keras_mp._compat.replacing import replaced

__all__ = ["share_of_batch"]

# Keras divides each mean over a replica's rows by the number of replicas, in a loss and in `add_loss`. The sum over
# replicas is then the mean over the batch only if all replicas have as many rows. It is wrong if `compute_loss` or the
# loss is a user's function that returns a mean. So here means stay as they are, and the total is weighted.
_share: contextvars.ContextVar["tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]] | None"] = contextvars.ContextVar(
    "_share", default=None
)


_keras_apply_mask = _loss.apply_mask
_keras_reduce_values = _loss.reduce_values
_keras_scale_loss_for_distribution = _loss.scale_loss_for_distribution
_keras_unscale_loss_for_distribution = _loss.unscale_loss_for_distribution


def _as_of_the_batch(divisor: Any) -> Any:
    """Returns the factor for a mean that was divided by a sum over this replica instead of the whole batch."""
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
    """Returns the value that trackers of single losses average over replicas, as over batches."""
    if (given := _share.get()) is None:
        return _keras_unscale_loss_for_distribution(value)
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return value * tf.cast(given[0] * replicas, value.dtype)


@contextlib.contextmanager
def share_of_batch(share: tf.Tensor | None, total_of: Callable[[tf.Tensor], tf.Tensor]) -> Iterator[None]:
    """Inside, Keras's losses cover only a replica's rows. The caller multiplies them by the replica's share.

    Their sum over replicas is then the mean over the whole batch, even if replicas have different numbers of rows. The
    same holds for means over unmasked elements or over the sum of the weights. A loss with `reduction="sum"` is divided
    by the share, so the total is the sum.

    Args:
        share: scalar between 0 and 1. The shares of all replicas add up to 1. None changes nothing.
        total_of: maps a float scalar of this replica to the sum over all replicas.
    """
    token = _share.set(None if share is None else (share, total_of))
    try:
        with contextlib.nullcontext() if share is None else replaced(_loss, **_ours):
            yield
    finally:
        _share.reset(token)


_ours: dict[str, Callable[..., Any]] = {
    "apply_mask": _apply_mask,
    "reduce_values": _reduce_values,
    "scale_loss_for_distribution": _scale_loss_for_distribution,
    "unscale_loss_for_distribution": _unscale_loss_for_distribution,
}
