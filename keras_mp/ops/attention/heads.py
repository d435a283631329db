"""Heads that share keys and values: the axes of query, key, value and masks.

Shapes are written as in `dot_product`.
"""

from typing import Any

import keras
import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["join_heads", "size_of", "split_heads", "split_mask", "swapped"]


def swapped(x: Any) -> Any:
    """(B, T, N, D) to (B, N, T, D), and back."""
    if 1 in (x.shape[1], x.shape[2]):  # nothing changes its place
        shape = [size_of(x, axis) for axis in (0, 2, 1, 3)]
        return fusion.shaped(tf.reshape(x, shape), [x.shape[axis] for axis in (0, 2, 1, 3)])
    return tf.transpose(x, [0, 2, 1, 3])


def split_heads(query: Any, groups: int) -> Any:
    """(B, T, heads, D) to (B, G, R, T, D)."""
    x = swapped(query)
    shape = [size_of(x, 0), groups, x.shape[1] // groups, size_of(x, 2), x.shape[3]]
    return fusion.shaped(tf.reshape(x, shape), [x.shape[0], *shape[1:3], x.shape[2], x.shape[3]])


def join_heads(outputs: Any) -> Any:
    """(B, G, R, T, D) to (B, T, heads, D)."""
    _, groups, repeats, length, features = outputs.shape
    shape = [size_of(outputs, 0), groups * repeats, size_of(outputs, 3), size_of(outputs, 4)]
    x = fusion.shaped(tf.reshape(outputs, shape), [outputs.shape[0], groups * repeats, length, features])
    return swapped(x)


def split_mask(mask: Any, heads: int, groups: int) -> Any:
    """Broadcastable to (B, heads, T, S), to broadcastable to (B, G, R, T, S)."""
    if mask.shape[1] == 1:
        return mask[:, :, None]
    shape = tf.shape(mask)
    return tf.reshape(mask, [shape[0], groups, heads // groups, shape[2], shape[3]])


def size_of(x: Any, axis: int) -> Any:
    """The size of an axis as an int, or as a tensor where it is not known yet."""
    return keras.ops.shape(x)[axis]
