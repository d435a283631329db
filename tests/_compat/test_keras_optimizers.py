"""Keras optimizers. Each test fails with the private name in its docstring when that moves."""

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
