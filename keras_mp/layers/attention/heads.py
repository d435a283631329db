"""What the attention layers of several heads share: projections, masks, and attention between them."""

from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_layer_parts, keras_layers
from keras_mp.layers.core.dense import EinsumDense
from keras_mp.ops.attention.dot_product import attend, attend_with_scores
from keras_mp.ops.attention.masks import Masks

__all__ = ["attend_projected", "masks_of", "project_by_matrices"]


def project_by_matrices(layer: keras.Layer) -> None:
    """Lets the projections, which Keras makes itself and gives no way to choose, compute as `EinsumDense` here."""
    for projection in keras_layers.inner_layers(layer):
        if type(projection) is keras.layers.EinsumDense:
            projection.__class__ = EinsumDense


def masks_of(
    window: int | None,
    *,
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
    attention_mask: Any = None,
    use_causal_mask: bool = False,
) -> Masks:
    """The arguments of a call as `Masks`."""
    query_mask, value_mask, key_mask, pairs = (
        None if mask is None else tf.cast(mask, tf.bool) for mask in (query_mask, value_mask, key_mask, attention_mask)
    )
    if pairs is not None:
        while len(pairs.shape) < 4:
            pairs = pairs[..., None, :, :]
    if value_mask is not None and key_mask is not None:
        key_mask &= value_mask
    return Masks(use_causal_mask, window, query_mask, value_mask if key_mask is None else key_mask, pairs)


def attend_projected(
    layer: Any,
    query: Any,
    key: Any,
    value: Any,
    masks: Masks,
    *,
    scale: float,
    dropout: float,
    training: bool | None,
    return_attention_scores: bool,
) -> tuple[Any, Any]:
    """What the two layers of several heads do with projected query, key and value."""
    rate = float(dropout) if training else 0.0
    seed = tf.cast(keras_layer_parts.dropout_seed(layer), tf.int32) if rate else None
    if return_attention_scores:
        return attend_with_scores(query, key, value, masks, scale=scale, rate=rate, seed=seed)
    outputs = attend(
        query,
        key,
        value,
        masks,
        scale=scale,
        rate=rate,
        seed=seed,
        blockwise=layer.flash_attention,
        hidden_rows_average=not dropout,
    )
    return outputs, None
