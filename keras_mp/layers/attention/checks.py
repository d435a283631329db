"""Refuses masks that do not fit, and other calls that attention layers cannot compute, with Keras's kinds of errors."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mp.errors import ArgumentError

__all__ = ["check_call", "check_mask", "require_steps"]


def require_steps(layer: keras.Layer, query_shape: Any, value_shape: Any) -> None:
    """Refuses tensors without an axis of steps, at which Keras fails over an axis that it makes itself."""
    if min(len(query_shape), len(value_shape)) < 3:
        raise ArgumentError(
            f"`{type(layer).__name__}` takes tensors of shape (batch, steps, features). Received: "
            f"query.shape={tuple(query_shape)}, value.shape={tuple(value_shape)}. For a single text type x[None]."
        )


def check_call(layer: Any, query: Any, value: Any, heads: int, call: dict[str, Any]) -> None:
    """Raises Keras's kinds of errors where masks do not fit or blocks are asked for scores."""
    if layer.flash_attention and call.get("return_attention_scores"):
        raise ValueError(
            "Returning attention scores is not supported when flash attention is enabled. Please disable flash "
            "attention to access attention scores."
        )
    if len(query.shape) != 3:
        return
    batch, steps, keys = query.shape[0], query.shape[1], value.shape[1]
    for name, length in (("query_mask", steps), ("value_mask", keys), ("key_mask", keys)):
        check_mask(layer, name, call.get(name), (batch, length), (2,), "(batch, steps)")
    words = "(batch, queries, keys) or (batch, heads, queries, keys)"
    check_mask(layer, "attention_mask", call.get("attention_mask"), (batch, heads, steps, keys), (2, 3, 4), words)


def check_mask(
    layer: Any, name: str, mask: Any, full: tuple[int | None, ...], ranks: Sequence[int], words: str
) -> None:
    """Raises Keras's kind of error for a mask that is none, or does not broadcast to the shape `full`, in `words`."""
    if mask is None:
        return
    mask = mask if hasattr(mask, "shape") else np.asarray(mask)
    shape, kind = tuple(mask.shape), type(layer).__name__
    if "string" in str(mask.dtype) or "<U" in str(mask.dtype):
        raise TypeError(f"The `{name}` of {kind} must be boolean. Received: {name}.dtype={mask.dtype} (string)")
    aligned = (shape[0], None, *shape[1:]) if len(shape) == 3 and len(full) == 4 else shape
    if len(shape) in ranks and all(
        given in (None, 1) or expected is None or given == expected
        for given, expected in zip(aligned[::-1], full[::-1], strict=False)
    ):
        return
    raise ValueError(
        f"The `{name}` of {kind} must be broadcastable to {words}, here {full}. Received: {name}.shape={shape}"
    )
