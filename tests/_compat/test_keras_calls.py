"""Calls of layers that are followed. Each test fails with the private name in its docstring when that moves."""

import keras
import tensorflow as tf

from keras_mp._compat import keras_calls


def test_inputs_and_outputs_pass_through_and_all_is_put_back():
    """Rests on `keras.Operation.__call__`, through which layers and operations are called."""
    before = keras.Operation.__call__
    layer, seen = keras.layers.Identity(), []

    def double(operation, arguments):
        seen.append(operation)
        (x,), kwargs = arguments
        return (2 * x,), kwargs

    with keras_calls.calls_through(double, lambda operation, y: y + 1):
        with keras_calls.calls_through(lambda operation, arguments: arguments, lambda operation, y: 10 * y):
            assert float(layer(tf.constant(3.0))) == 70
        assert float(layer(tf.constant(3.0))) == 7
    assert float(layer(tf.constant(3.0))) == 3
    assert seen == [layer, layer]
    assert keras.Operation.__call__ is before


def test_symbolic_calls_are_told():
    """Rests on `keras.src.backend.common.symbolic_scope.in_symbolic_scope`."""
    seen = []

    class Looks(keras.layers.Layer):
        def call(self, x):
            seen.append(keras_calls.in_symbolic_call())
            return x + 1

    layer = Looks()
    layer(keras.Input((2,)))
    layer(tf.ones((1, 2)))
    assert seen == [True, False]


def test_loops_are_told():
    """Rests on `tensorflow.python.ops.control_flow_util_v2.in_while_loop_defun`."""
    seen = []

    @tf.function
    def program(x):
        seen.append(keras_calls.in_loop())

        def body(x):
            seen.append(keras_calls.in_loop())
            return x + 1

        return tf.while_loop(lambda x: x < 3, body, [x])

    program(tf.constant(0))
    assert seen == [False, True]
    assert not keras_calls.in_loop()


def test_a_plain_variable_is_one_under_a_strategy(mirrored):
    """Rests on `tensorflow.python.ops.resource_variable_ops.ResourceVariable`."""
    with mirrored(2).scope():
        variable = keras_calls.plain_variable(1.0)
    assert not isinstance(variable, tf.distribute.DistributedValues)
    assert float(variable) == 1
