"""Softmax attention with half-precision matmuls, which keeps one matrix for the backward pass, or none.

`whole` keeps the probabilities of all pairs in half precision for the backward pass. From a length where it
pays, `blocks` takes queries and keys in blocks, and memory grows linearly with the length.

Shapes are written with B batch, G groups of heads that share keys and values, R query heads in each, T queries, S keys,
D features; a block has P queries and Q keys.
"""

import functools
from typing import Any

import tensorflow as tf

from keras_mp.ops import fusion
from keras_mp.ops.attention.blocks import in_blocks
from keras_mp.ops.attention.float_range import wide_dtype
from keras_mp.ops.attention.heads import join_heads, size_of, split_heads, split_mask, swapped
from keras_mp.ops.attention.masks import Masks, Settings
from keras_mp.ops.attention.whole import at_once, dropped_of

__all__ = ["attend", "attend_with_scores"]

# On two CPU cores, one block was faster below 1024 keys.
BLOCKWISE_FROM = 1024


def attend(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    masks: Masks,
    *,
    scale: float,
    rate: float = 0.0,
    seed: Any = None,
    blockwise: bool | None = None,
    hidden_rows_average: bool = True,
) -> tf.Tensor:
    """softmax(scale * query @ key^T) @ value for each head.

    Args:
        query: of shape (B, T, heads, D).
        key: of shape (B, S, groups, D), where the heads are a multiple of the groups; head h reads group
            h // (heads / groups).
        value: of shape (B, S, groups, D of the output).
        masks: which query sees which key.
        scale: what the products are multiplied by.
        rate: share of the probabilities that is dropped.
        seed: int32, of shape (2,); needed where `rate` is not 0.
        blockwise: whether to take queries and keys in blocks; None: where the length is `BLOCKWISE_FROM` or unknown.
        hidden_rows_average: whether a query that sees no key gets the mean of all values, or else zeros.

    Returns:
        Tensor of shape (B, T, heads, D of the output), in the dtype of `value`.
    """
    if blockwise is None:
        lengths = query.shape[1], key.shape[1]
        blockwise = None in lengths or min(lengths) >= BLOCKWISE_FROM
    outputs, seen, _ = _attend(query, key, value, masks, scale, rate, seed, blockwise=blockwise)
    return join_heads(_without_hidden_rows(outputs, value, seen, hidden_rows_average))


def attend_with_scores(
    query: tf.Tensor,
    key: tf.Tensor,
    value: tf.Tensor,
    masks: Masks,
    *,
    scale: float,
    rate: float = 0.0,
    seed: Any = None,
    hidden_rows_average: bool = False,
    scores_after_dropout: bool = False,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The same in one block, which also returns the probabilities, of shape (B, heads, T, S)."""
    heads = query.shape[2]
    outputs, seen, probabilities = _attend(query, key, value, masks, scale, rate, seed, with_scores=True)
    if seen is not None and hidden_rows_average:
        even = tf.cast(1.0 / tf.cast(tf.shape(probabilities)[-1], wide_dtype(probabilities.dtype)), probabilities.dtype)
        probabilities = tf.where(seen, probabilities, even)
    elif masks.query is not None:
        probabilities = tf.where(seen, probabilities, tf.zeros([], probabilities.dtype))
    if rate and scores_after_dropout:
        # Those that the outputs are without: of one seed, XLA makes other numbers than TensorFlow.
        drop = dropped_of(fusion.pays(query, key, value))
        probabilities = drop(probabilities, seed, settings=Settings(scale, False, None, rate))
    outputs = join_heads(_without_hidden_rows(outputs, value, seen, hidden_rows_average))
    scores = tf.reshape(probabilities, [-1, heads, *(size_of(probabilities, axis) for axis in (3, 4))])
    return outputs, fusion.shaped(scores, [query.shape[0], heads, query.shape[1], key.shape[1]])


def _attend(
    query: Any,
    key: Any,
    value: Any,
    masks: Masks,
    scale: float,
    rate: float,
    seed: Any,
    *,
    blockwise: bool = False,
    with_scores: bool = False,
) -> tuple[Any, Any, Any]:
    """The outputs (B, G, R, T, D), whether each query sees a key (None where all do), and the scores or None."""
    heads, groups = query.shape[2], key.shape[2]
    q = split_heads(query, groups)
    k, v = swapped(key), swapped(value)
    settings = Settings(scale, masks.causal, masks.window, rate)
    hides = {}
    if masks.key is not None:
        hides["key_mask"] = masks.key[:, None, None, None, :]
    if masks.pairs is not None:
        hides["pair_mask"] = split_mask(masks.pairs, heads, groups)
    if rate:
        hides["seed"] = seed
    run = in_blocks if blockwise else functools.partial(at_once, with_scores=with_scores)
    outputs, log_sums, *scores = run(q, k, v, hides, settings, fusion.pays(query, key, value))
    seen = None
    if masks.may_hide_rows():
        seen = tf.not_equal(log_sums[..., 1:], -float("inf"))
        if masks.query is not None:
            seen &= masks.query[:, None, None, :, None]
    return outputs, seen, scores[0] if scores else None


def _without_hidden_rows(outputs: Any, value: Any, seen: Any, average: bool) -> Any:
    """The outputs with the mean of all values, or zeros, for queries that see no key."""
    if seen is None:
        return outputs
    filling = tf.zeros([], outputs.dtype)
    if average:
        filling = tf.cast(tf.reduce_mean(tf.cast(value, wide_dtype(value.dtype)), axis=1), outputs.dtype)[
            :, :, None, None, :
        ]
    return tf.where(seen, outputs, filling)
