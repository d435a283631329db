"""Parts that Keras's own layers hold, and that the layers here, which inherit from them, use in their place."""

from typing import Any, NamedTuple

import keras

__all__ = [
    "Projections",
    "config_dropout_masks",
    "dropout_seed",
    "expected_batch_size",
    "head_settings",
    "kept_shapes",
    "projections",
    "reduced_axes",
    "reset_dropout_masks",
    "shape_built_for",
]


class Projections(NamedTuple):
    """The dense layers of an attention layer. `gate` is None without one."""

    query: keras.Layer
    key: keras.Layer
    value: keras.Layer
    output: keras.Layer
    gate: keras.Layer | None


def projections(layer: keras.layers.GroupQueryAttention) -> Projections:
    """Returns the layers that project to and from heads, which have no public names."""
    gate = layer._gate_dense if layer.use_gate else None
    return Projections(layer._query_dense, layer._key_dense, layer._value_dense, layer._output_dense, gate)


def head_settings(layer: keras.layers.MultiHeadAttention) -> tuple[int | None, float, float]:
    """Returns the sliding window, the scale of the scores and the dropout rate, which have no public names."""
    return layer._sliding_window, layer._inverse_sqrt_key_dim, layer._dropout


def dropout_seed(layer: Any) -> Any:
    """Returns the next seed of an attention layer's dropout. Its dropout layer has no public name."""
    return layer._dropout_layer.seed_generator.next()


def kept_shapes(layer: keras.layers.Normalization) -> tuple[Any, Any]:
    """Returns the shape of the statistics, and the one in which they broadcast to the input; neither is public."""
    return layer._mean_and_var_shape, layer._broadcast_shape


def reduced_axes(layer: keras.layers.Normalization) -> tuple[int, ...]:
    """Returns the axes that the statistics are taken over. The public `axis` names the others."""
    return tuple(layer._reduce_axis)


def shape_built_for(layer: keras.layers.Normalization) -> Any:
    """Returns the input shape that a layer was built for, which no public name tells."""
    return layer._build_input_shape


def expected_batch_size(layer: keras.layers.RNN) -> int | None:
    """Returns the batch size of a stateful layer's states; the layer refuses others. No public name tells it."""
    return layer._expected_batch_size


def config_dropout_masks(layer: keras.layers.RNN, cell: Any, timestep: Any, state: Any) -> None:
    """Draws the random masks of a cell before the loop, once for all timesteps, as Keras's `call` does."""
    layer._maybe_config_dropout_masks(cell, timestep, state)


def reset_dropout_masks(layer: keras.layers.RNN, cell: Any) -> None:
    """Forgets the random masks of a cell after the loop, as Keras's `call` does."""
    layer._maybe_reset_dropout_masks(cell)
