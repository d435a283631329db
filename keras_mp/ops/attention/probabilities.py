"""One block: from products to probabilities, and back.

Shapes are written as in `dot_product`.
"""

from typing import Any

import tensorflow as tf

from keras_mp.ops import fusion
from keras_mp.ops.attention.float_range import wide_dtype
from keras_mp.ops.attention.masks import Settings

__all__ = ["backward_of", "dropout_factors", "forward_of"]


def _logits(products: Any, given: dict[str, Any], settings: Settings) -> Any:
    """The products in float32, scaled, and -inf where they are hidden."""
    dtype = wide_dtype(products.dtype)
    logits = tf.cast(products, dtype) * settings.scale
    if "factor" in given:
        logits *= tf.cast(given["factor"], dtype)
    rows = given.get("first_row", 0) + tf.range(tf.shape(products)[3])[:, None]
    columns = given.get("first_column", 0) + tf.range(tf.shape(products)[4])[None, :]
    conditions = [given[name] for name in ("key_mask", "pair_mask") if name in given]
    if settings.causal:
        conditions.append(columns <= rows)
    if settings.window is not None:
        conditions.append(tf.abs(rows - columns) < settings.window)
    if "length" in given:
        conditions.append(columns < given["length"])
    for condition in conditions:
        logits = tf.where(condition, logits, -float("inf"))
    return logits


def _softmax(logits: Any) -> tuple[Any, Any]:
    """Probabilities of each row, zeros where all is hidden; its largest logit and the logarithm of its sum beside that.

    As one number, the logarithm of the whole sum, the second would be lost beside a first that is large.
    """
    rows = (logits.shape.rank - 1,)
    largest = fusion.largest(logits, rows)
    largest = tf.where(tf.equal(largest, -float("inf")), tf.zeros_like(largest), largest)
    exponentials = tf.exp(logits - largest)
    total = fusion.total(exponentials, rows)
    inverse = 1.0 / tf.where(tf.equal(total, 0.0), tf.ones_like(total), total)
    return exponentials * inverse, tf.concat([largest, tf.math.log(total)], -1)


def dropout_factors(p: Any, given: dict[str, Any], settings: Settings) -> Any:
    """What dropout multiplies the probabilities by: 0, or 1 over the share that is kept."""
    uniform = tf.random.stateless_uniform(tf.shape(p), given["seed"], dtype=tf.float32)
    return tf.cast(uniform >= settings.rate, p.dtype) / (1.0 - settings.rate)


def _block_forward(products: Any, *tensors: Any, names: tuple[str, ...], settings: Settings) -> tuple[Any, Any]:
    given = dict(zip(names, tensors, strict=True))
    p, log_sum = _softmax(_logits(products, given, settings))
    if settings.rate:
        p *= dropout_factors(p, given, settings)
    return tf.cast(p, products.dtype), log_sum


def _block_backward(
    products: Any, slopes: Any, *tensors: Any, names: tuple[str, ...], settings: Settings
) -> tuple[Any, Any]:
    """The probabilities again, for the gradient to the values, and the gradient to the unscaled products.

    `slopes` are the products of the upstream gradient with the values: the gradient to the probabilities.
    """
    given = dict(zip(names, tensors, strict=True))
    logits, sums = _logits(products, given, settings), given["log_sums"]
    largest, log_total = sums[..., :1], sums[..., 1:]
    log_total = tf.where(tf.equal(log_total, -float("inf")), tf.zeros_like(log_total), log_total)
    p = tf.exp((logits - largest) - log_total)
    g = tf.cast(slopes, p.dtype)
    kept = p
    if settings.rate:
        keep = dropout_factors(p, given, settings)
        g, kept = g * keep, p * keep
    to_logits = p * (g - given["average"])
    return tf.cast(kept, products.dtype), tf.cast(settings.scale * to_logits, products.dtype)


forward_of = fusion.fusible(_block_forward)
backward_of = fusion.fusible(_block_backward)
