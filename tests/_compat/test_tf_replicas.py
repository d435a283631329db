"""Strategies and replicas. Each test fails with the private name in its docstring when that moves."""

import keras
import tensorflow as tf

from keras_mp._compat import tf_replicas


def test_one_device_steps_out_of_the_strategy_and_back(mirrored):
    """Rests on `distribute_lib._push_per_thread_mode`, `keras.Variable._value`, `Optimizer._distribution_strategy`."""
    strategy = mirrored(2)
    with strategy.scope():
        variable, optimizer = keras.Variable(1.0), keras.optimizers.SGD()
    whole = variable.value

    def program():
        def across(strategy):
            for index in range(2):
                with tf_replicas.one_device(index, [variable], [optimizer]):
                    assert not tf.distribute.has_strategy()
                    assert optimizer._distribution_strategy is tf.distribute.get_strategy()
                    assert variable.value is whole.values[index]
                    variable.assign(10.0 + index)

        tf.distribute.get_replica_context().merge_call(across)

    tf.function(lambda: strategy.run(program))()
    assert [float(value) for value in whole.values] == [10.0, 11.0]
    assert variable.value is whole
    assert optimizer._distribution_strategy is strategy
    assert not tf.distribute.has_strategy()


def test_without_all_reduce_takes_sums_as_they_are():
    """Rests on `Optimizer._all_reduce_sum_gradients`, through which Keras's optimizers add up over replicas."""
    variable, optimizer, calls = keras.Variable([0.0]), keras.optimizers.SGD(1.0), []
    keras_own = optimizer._all_reduce_sum_gradients
    optimizer._all_reduce_sum_gradients = lambda pairs: calls.append("Keras's") or keras_own(pairs)
    optimizer.apply([tf.ones([1])], [variable])
    del optimizer._all_reduce_sum_gradients
    with tf_replicas.without_all_reduce([optimizer]):
        assert optimizer._all_reduce_sum_gradients is list
        optimizer.apply([tf.ones([1])], [variable])
    assert optimizer._all_reduce_sum_gradients == keras_own
    assert calls == ["Keras's"]
    assert variable.numpy().tolist() == [-2.0]


def test_merges_replicas_tells_whether_replicas_meet(mirrored):
    """Rests on `tf.__internal__.distribute.strategy_supports_no_merge_call`."""
    assert not tf_replicas.merges_replicas()
    with mirrored(2).scope():
        assert tf_replicas.merges_replicas()
