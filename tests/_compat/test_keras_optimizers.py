import keras
import numpy as np
import pytest

from keras_mp._compat import keras_optimizers


def built(optimizer):
    variables = [keras.Variable(np.zeros(2, "float32")), keras.Variable(np.zeros(3, "float32"))]
    optimizer.build(variables)
    return variables


def test_a_schedule_is_returned_itself():
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 10)
    assert keras_optimizers.learning_rate_source(keras.optimizers.SGD(schedule)) is schedule


def test_an_assigned_learning_rate_is_read():
    optimizer = keras.optimizers.SGD(0.25)
    assert float(keras_optimizers.learning_rate_source(optimizer)) == 0.25


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (keras.optimizers.Adagrad, "accumulators"),
        (keras.optimizers.Adam, "momentums"),
        (keras.optimizers.Adam, "velocities"),
        (lambda: keras.optimizers.SGD(0.1, momentum=0.9), "momentums"),
    ],
)
def test_a_slot_belongs_to_its_variable(make, name):
    optimizer = make()
    variables = built(optimizer)
    slots = [keras_optimizers.slot_of(optimizer, name, variable) for variable in variables]
    assert [tuple(slot.shape) for slot in slots] == [(2,), (3,)]
    assert all(any(slot is each for each in optimizer.variables) for slot in slots)


def test_a_tracked_variable_is_saved_with_the_others():
    optimizer, variable = keras.optimizers.SGD(0.1), keras.Variable(1.0)
    keras_optimizers.track(optimizer, variable)
    assert any(each is variable for each in optimizer.variables)


def test_every_step_is_counted_where_gradients_are_accumulated():
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    variables = built(optimizer)
    for _ in range(3):
        optimizer.apply([np.ones(2, "float32"), np.ones(3, "float32")], variables)
    assert int(keras_optimizers.update_count(optimizer)) == 3
    assert int(optimizer.iterations) == 1
