"""The dtype to compute in, and scales so that no product leaves float16."""

from typing import Any

import tensorflow as tf

__all__ = ["power_of_two_above", "wide_dtype", "within_range"]


def wide_dtype(dtype: Any) -> Any:
    """The dtype to compute in."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def within_range(rows: Any, columns: Any) -> tuple[Any, Any]:
    """Rows scaled so that no product with a column leaves float16, and what to multiply the products by in float32.

    The scale is a power of two, so nothing is rounded, and one but for rows and columns of great length: a product is
    at most the product of the lengths. (B, G, R, P, D) and (B, G, Q, D) to the shape of the former and (B, G, R, P, 1).
    """
    if rows.dtype != tf.float16:
        return rows, tf.ones([], wide_dtype(rows.dtype))
    longest = tf.reduce_max(tf.norm(tf.cast(columns, tf.float32), axis=-1), axis=-1)[:, :, None, None, None]
    bound = tf.norm(tf.cast(rows, tf.float32), axis=-1, keepdims=True) * longest / 2.0**15
    factor = power_of_two_above(bound)
    return rows * tf.cast(1.0 / factor, tf.float16), factor


def power_of_two_above(x: Any) -> Any:
    """The least that is not below `x` nor below 1."""
    return tf.where(x > 1.0, tf.pow(2.0, tf.math.ceil(tf.math.log(x) / tf.math.log(2.0))), 1.0)
