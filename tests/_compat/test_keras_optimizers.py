"""Keras optimizers. Each test fails with the private name in its docstring when that moves."""

import threading

import keras
import numpy as np
import pytest

from keras_mp._compat import keras_optimizers


def test_a_copy_of_an_optimizer_knows_the_copies_of_variables():
    """Rests on `_var_key`, `_trainable_variables_indices`, `_exclude_from_weight_decay` and `_trainable_variables`."""
    pairs = {}
    for name in ("kernel", "bias"):
        original = keras.Variable([1.0], name=name)
        pairs[id(original)] = (original, keras.Variable([1.0], name=name))
    (kernel, copied), (bias, _) = pairs.values()
    optimizer, copy = (keras.optimizers.SGD(0.1, weight_decay=1.0) for _ in range(2))
    optimizer.exclude_from_weight_decay([kernel])
    optimizer.build([kernel, bias])
    assert keras_optimizers.trained_by(optimizer) == [kernel, bias]
    keras_optimizers.renumber(optimizer, copy, [kernel, bias], lambda variable: pairs[id(variable)][1])
    assert copy._get_variable_index(copied) == 0
    assert not copy._use_weight_decay(copied)
    with keras_optimizers.built_already(copy):
        copy.build([kernel])
    assert keras_optimizers.trained_by(copy) == []


def test_variables_are_added_in_another_dtype_in_this_thread():
    """Rests on `Optimizer.add_variable`, through which Keras's optimizers make their slots."""
    weights = [keras.Variable([1.0, 2.0], dtype="float16"), keras.Variable([1.0], dtype="float64")]
    inside, outside, seen = keras.optimizers.Adam(), keras.optimizers.Adam(), []

    def dtype_of(dtype, name):
        seen.append(name)
        return "float32" if dtype == "float16" else dtype

    with keras_optimizers.adding_variables_in(dtype_of):
        inside.build(weights)
        thread = threading.Thread(target=lambda: outside.build(weights))
        thread.start()
        thread.join()
    assert "add_variable" not in vars(keras.optimizers.Optimizer)
    assert len(seen) == 4
    dtypes = [[str(each.dtype) for each in optimizer.variables[-4:]] for optimizer in (inside, outside)]
    assert [sorted(each) for each in dtypes] == [["float32"] * 2 + ["float64"] * 2, ["float16"] * 2 + ["float64"] * 2]


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
