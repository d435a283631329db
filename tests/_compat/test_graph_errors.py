"""Exceptions that are raised inside a graph. Each test fails with the private name in its docstring when that moves."""

import pickle

import pytest
import tensorflow as tf

from keras_mp._compat import graph_errors, patches

patches.install_on_first_use()


def raising(error):
    @tf.function
    def program(x):
        tf.cond(x > 0, lambda: graph_errors.raise_from_graph(lambda x: error(f"x is {x}"), [x]), tf.no_op)
        return x

    return program


def test_raise_from_graph_raises_the_very_type_with_its_text():
    """Rests on TensorFlow making a `tf.errors.UnknownError` by calling the class."""

    class ThisError(ValueError):
        pass

    program = raising(ThisError)
    assert int(program(tf.constant(0))) == 0
    for x in (1, 2):
        with pytest.raises(ThisError) as raised:
            program(tf.constant(x))
        assert str(raised.value) == f"x is {x}"
        assert isinstance(raised.value, tf.errors.UnknownError)
        assert raised.value.args == (f"x is {x}",)


def test_other_unknown_errors_are_what_they_were():
    error = tf.errors.UnknownError(None, None, "something")
    assert type(error) is tf.errors.UnknownError
    assert error.message == "something"

    def fails():
        raise RuntimeError("something else")

    with pytest.raises(tf.errors.UnknownError, match="something else") as raised:
        tf.function(lambda: tf.py_function(fails, [], tf.float32))()
    assert type(raised.value) is tf.errors.UnknownError


def test_raise_from_graph_raises_under_replicas_and_the_next_step_runs(mirrored):
    class ThisError(ValueError):
        pass

    strategy, program = mirrored(2), raising(ThisError)
    step = tf.function(lambda x: strategy.run(program, (x,)))
    for x in (1, 2):
        with pytest.raises(ThisError, match=f"^x is {x}$"):
            step(tf.constant(x))
    results = strategy.experimental_local_results(step(tf.constant(0)))
    assert {int(value) for value in results} == {0}


def test_an_unknown_error_survives_pickling():
    error = pickle.loads(pickle.dumps(tf.errors.UnknownError(None, None, "something")))
    assert type(error) is tf.errors.UnknownError
    assert error.message == "something"
