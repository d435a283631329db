"""The matmuls of attention, for heads that share keys and values.

Shapes are written as in `dot_product`.
"""

from typing import Any

import tensorflow as tf

from keras_mp.ops.attention.heads import size_of

__all__ = ["gathered", "products", "weighted"]


def products(q: Any, k: Any) -> Any:
    """(B, G, R, P, D) and (B, G, Q, D) to (B, G, R, P, Q)."""
    return _per_group(lambda rows: tf.matmul(rows, k, transpose_b=True), q)


def weighted(p: Any, v: Any) -> Any:
    """(B, G, R, P, Q) and (B, G, Q, D) to (B, G, R, P, D)."""
    return _per_group(lambda rows: tf.matmul(rows, v), p)


def gathered(p: Any, x: Any) -> Any:
    """(B, G, R, P, Q) and (B, G, R, P, D) to (B, G, Q, D), summed over R and P."""
    return tf.matmul(_rows(p), _rows(x), transpose_a=True)


def _rows(x: Any) -> Any:
    """(B, G, R, P, D) to (B, G, R * P, D)."""
    shape = [size_of(x, 0), x.shape[1], size_of(x, 3) * x.shape[2], size_of(x, 4)]
    return tf.reshape(x, shape)


def _per_group(function: Any, x: Any) -> Any:
    y = function(_rows(x))
    return tf.reshape(y, [size_of(x, 0), x.shape[1], x.shape[2], size_of(x, 3), size_of(y, 3)])
