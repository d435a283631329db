"""Keras optimizers. Each test fails with the private name in its docstring when that moves."""

import threading

import keras

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
