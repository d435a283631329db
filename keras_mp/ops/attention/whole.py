"""Attention with one matrix of scores, whose probabilities are kept in half precision for the backward pass.

Shapes are written as in `dot_product`.
"""

from typing import Any

import tensorflow as tf

from keras_mp._compat import execution
from keras_mp.ops import fusion
from keras_mp.ops.attention.float_range import power_of_two_above, wide_dtype, within_range
from keras_mp.ops.attention.masks import Settings
from keras_mp.ops.attention.probabilities import dropout_factors, forward_of
from keras_mp.ops.attention.products import gathered, products, weighted

__all__ = ["at_once", "dropped_of"]


def _dropped(p: Any, seed: Any, *, settings: Settings) -> Any:
    wide = tf.cast(p, wide_dtype(p.dtype))
    return tf.cast(wide * dropout_factors(wide, {"seed": seed}, settings), p.dtype)


def _from_probabilities(
    p: Any, slopes: Any, *tensors: Any, names: tuple[str, ...], settings: Settings
) -> tuple[Any, ...]:
    """The gradient to the unscaled products, and the probabilities after dropout where there is any.

    As in the softmax of `keras_mp.activations`, the sum of a row's rounded probabilities stands in for 1.
    """
    given, rows = dict(zip(names, tensors, strict=True)), (p.shape.rank - 1,)
    wide = tf.cast(p, wide_dtype(p.dtype))
    g = tf.cast(slopes, wide.dtype) * tf.cast(given["slope_factor"], wide.dtype)
    dropped: tuple[Any, ...] = ()
    if settings.rate:
        keep = dropout_factors(wide, given, settings)
        g, dropped = g * keep, (tf.cast(wide * keep, p.dtype),)
    if "to_scores" in given:
        g += tf.cast(given["to_scores"], wide.dtype) * tf.cast(given["score_factor"], wide.dtype)
    to_logits = wide * (g * fusion.total(wide, rows) - fusion.total(g * wide, rows))
    return tf.cast(settings.scale * to_logits, p.dtype), *dropped


dropped_of = fusion.fusible(_dropped)
_from_probabilities_of = fusion.fusible(_from_probabilities)


def at_once(
    q: Any, k: Any, v: Any, hides: dict[str, Any], settings: Settings, fused: bool, with_scores: bool = False
) -> tuple[Any, ...]:
    """One block of everything; keeps q, k, v and the probabilities, and returns these too where `with_scores` is set.

    Computing the probabilities again in the backward pass would save their memory, at the cost of a product and of
    their exponentials.
    """
    undropped = settings._replace(rate=0.0)
    seed = {"seed": hides["seed"]} if settings.rate else {}
    masks = {name: mask for name, mask in hides.items() if name != "seed"}
    whole = execution.in_xla_context()

    @fusion.custom_gradient
    def attention(q: Any, k: Any, v: Any) -> Any:
        bounded, factor = within_range(q, k)
        given = masks | {"factor": tf.stop_gradient(factor)}
        p, log_sums = forward_of(fused)(products(bounded, k), *given.values(), names=tuple(given), settings=undropped)
        (p,) = fusion.held(whole and execution.recording(), p)
        dropped = dropped_of(fused)(p, seed["seed"], settings=settings) if settings.rate else p
        kept = q, k, v, p

        def gradient(upstream: Any, _: Any, *to_scores: Any) -> Any:
            q, k, v, p = fusion.held(whole, *kept)
            bounded, factor = within_range(upstream, v)
            # What goes to the products is at most twice the largest slope: shared out in two factors it fits 16 bits.
            top = power_of_two_above(2.0 * settings.scale * tf.reduce_max(factor)) if q.dtype == tf.float16 else 1.0
            given = seed | {"slope_factor": tf.stop_gradient(factor / top)}
            if to_scores:
                given |= {"to_scores": to_scores[0], "score_factor": tf.stop_gradient(1.0 / tf.convert_to_tensor(top))}
            to_products, *dropped = _from_probabilities_of(fused)(
                p, products(bounded, v), *given.values(), names=tuple(given), settings=settings
            )
            to_q, to_k = weighted(to_products, k), gathered(to_products, q)
            if q.dtype == tf.float16:
                to_q, to_k = (tf.cast(tf.cast(x, tf.float32) * top, tf.float16) for x in (to_q, to_k))
            return to_q, to_k, gathered(dropped[0] if dropped else p, upstream)

        return (weighted(dropped, v), log_sums, *([p] if with_scores else [])), gradient

    return attention(q, k, v)
