"""Keras variables. Each test fails with the private name in its docstring when that moves."""

import keras
import pytest
import tensorflow as tf

from keras_mp._compat import keras_variables


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float32", "float64"])
def test_uncast_gives_what_is_stored(policy):
    class Reader(keras.layers.Layer):
        def build(self, shape):
            self.weight = self.add_weight(shape=(), initializer=lambda shape, dtype: tf.constant(1.0001, dtype))

        def call(self, x):
            return keras_variables.uncast(self.weight), tf.convert_to_tensor(self.weight)

    layer = Reader(dtype=policy)
    stored, seen = layer(tf.zeros([1]))
    assert stored.dtype == layer.variable_dtype
    assert float(stored) == float(tf.constant(1.0001, layer.variable_dtype))
    assert seen.dtype == layer.compute_dtype


def test_autocasts_tells_of_statistics_and_weights():
    """Rests on `Variable._autocast`."""
    layer = keras.layers.Layer(dtype="mixed_bfloat16")
    assert keras_variables.autocasts(layer.add_weight(shape=(2,)))
    assert not keras_variables.autocasts(layer.add_weight(shape=(2,), autocast=False))


def test_a_variable_is_read_in_another_dtype():
    """Rests on `_autocast` of a variable and `AutocastScope`."""
    variable = keras.Variable([1.0], autocast=False)
    with keras_variables.reading_in("bfloat16", variable):
        assert keras.ops.convert_to_tensor(variable).dtype == tf.bfloat16
    assert keras.ops.convert_to_tensor(variable).dtype == tf.float32


def test_slots_are_found_for_a_view_in_float32():
    """Rests on `Optimizer._var_key` and `_unique_id`, by which Keras finds the slots of a variable."""
    variable, optimizer = keras.Variable([1.0, 2.0], dtype="float16"), keras.optimizers.SGD(0.5, momentum=0.5)
    optimizer.build([variable])
    view = keras_variables.Float32View(variable.value, optimizer)
    assert optimizer._var_key(view) == optimizer._var_key(variable)
    assert optimizer._get_variable_index(view) == 0
    optimizer.update_step(tf.constant([2.0, -2.0]), view, 0.5)
    assert variable.numpy().tolist() == [0.0, 3.0]
    assert optimizer.momentums[0].numpy().tolist() == [-1.0, 1.0]
