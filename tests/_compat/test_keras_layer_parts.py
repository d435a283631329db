"""Parts of Keras's layers. Each test fails with the private name in its docstring when that moves."""

import math

import keras
import numpy as np
import pytest

from keras_mp._compat import keras_layer_parts


@pytest.mark.parametrize("gate", [False, True])
def test_the_projections_of_grouped_heads(gate):
    """Rests on `_query_dense`, `_key_dense`, `_value_dense`, `_output_dense` and `_gate_dense`."""
    layer = keras.layers.GroupQueryAttention(4, 6, 3, use_gate=gate)
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype("float32")
    y = layer(x, x)
    parts = keras_layer_parts.projections(layer)
    assert [tuple(each(x).shape) for each in parts[:3]] == [(2, 5, 6, 4), (2, 5, 3, 4), (2, 5, 3, 4)]
    assert parts.output.kernel.shape[-1] == y.shape[-1]
    assert (parts.gate is not None) is gate


def test_the_settings_of_several_heads():
    """Rests on `_sliding_window`, `_inverse_sqrt_key_dim`, `_dropout` and `_dropout_layer`."""
    layer = keras.layers.MultiHeadAttention(2, 16, dropout=0.25, sliding_window=3)
    assert keras_layer_parts.head_settings(layer) == (3, 1 / math.sqrt(16), 0.25)
    layer.build((2, 5, 8), (2, 5, 8))
    first, second = (keras_layer_parts.dropout_seed(layer) for _ in range(2))
    assert np.any(np.array(first) != np.array(second))


def test_the_shapes_of_a_normalization():
    """Rests on `_mean_and_var_shape`, `_broadcast_shape`, `_reduce_axis` and `_build_input_shape`."""
    layer = keras.layers.Normalization(axis=-1)
    layer.build((None, 4, 3))
    assert [tuple(each) for each in keras_layer_parts.kept_shapes(layer)] == [(3,), (1, 1, 3)]
    assert keras_layer_parts.reduced_axes(layer) == (0, 1)
    assert tuple(keras_layer_parts.shape_built_for(layer)) == (None, 4, 3)


def test_the_loop_of_a_recurrent_layer():
    """Rests on `_expected_batch_size`, `_maybe_config_dropout_masks` and `_maybe_reset_dropout_masks`."""
    layer = keras.layers.LSTM(3, stateful=True, dropout=0.5, recurrent_dropout=0.5)
    layer.build((2, 5, 4))
    assert keras_layer_parts.expected_batch_size(layer) == 2
    cell, state = layer.cell, layer.get_initial_state(2)
    keras_layer_parts.config_dropout_masks(layer, cell, keras.ops.ones((2, 4)), state)
    mask = cell.get_dropout_mask(keras.ops.ones((2, 4)))
    assert np.array_equal(mask, cell.get_dropout_mask(keras.ops.ones((2, 4))))
    keras_layer_parts.reset_dropout_masks(layer, cell)
    assert np.array(cell.get_dropout_mask(keras.ops.ones((6, 4)))).shape[-2:] == (6, 4)
