"""The scores of additive attention, without a tensor of all pairs and features."""

from typing import Any

import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["additive_scores"]


def _tanh_of_sums(query: Any, key: Any, scale: Any) -> Any:
    """Of shape (B, Tq, Tv, dim)."""
    return tf.tanh(scale * (tf.cast(query, scale.dtype)[..., :, None, :] + tf.cast(key, scale.dtype)[..., None, :, :]))


def _additive_scores_forward(query: Any, key: Any, scale: Any, weight: Any) -> Any:
    tanh = _tanh_of_sums(query, key, scale)
    return tf.cast(tf.squeeze(fusion.total(weight * tanh, (tanh.shape.rank - 1,)), -1), query.dtype)


def _additive_scores_backward(query: Any, key: Any, scale: Any, weight: Any, upstream: Any) -> list[Any]:
    tanh = _tanh_of_sums(query, key, scale)
    g = tf.cast(upstream, scale.dtype)[..., None]
    slope = g * weight * (1.0 - tf.square(tanh))
    keys = tanh.shape.rank - 2
    to_query = tf.squeeze(fusion.total(slope, (keys,)), keys)
    to_key = tf.reduce_sum(slope, keys - 1)
    # What the scale multiplies is the query and the key: no third sum over all pairs.
    to_scale = sum(tf.reduce_sum(tf.cast(x, slope.dtype) * to_x) for x, to_x in ((query, to_query), (key, to_key)))
    to_weight = tf.reduce_sum(fusion.total(g * tanh, (keys,)), list(range(keys + 1)))
    return [
        tf.cast(scale * to_query, query.dtype),
        tf.cast(scale * to_key, key.dtype),
        tf.reshape(to_scale, [1]),
        to_weight,
    ]


# sum over d of weight_d * tanh(scale * (query_d + key_d)), for each pair.
additive_scores = fusion.operation(_additive_scores_forward, _additive_scores_backward)
