"""Matmuls are counted from a graph."""

import keras
import tensorflow as tf

from keras_mp.tuning.matmul_counts import count_matmuls


def graph_of(function, *shapes):
    return tf.function(function).get_concrete_function(*(tf.TensorSpec(shape) for shape in shapes)).graph


def test_matmuls_are_counted_as_tensorflows_profiler_counts_them():
    def function(x, image):
        dense = tf.matmul(x, x, transpose_a=True)
        image = tf.nn.conv2d(image, tf.ones((3, 3, 4, 8)), strides=2, padding="SAME")
        return dense, image

    graph = graph_of(function, (16, 8), (2, 10, 10, 4))
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    profile = tf.compat.v1.profiler.profile(graph, options={**options, "output": "none"})
    work = count_matmuls(graph)
    assert work.complete
    assert work.flops == profile.total_float_ops > 0


def test_the_matmuls_of_a_backward_pass_are_twice_those_of_the_forward_pass():
    dense, conv = keras.layers.Dense(32), keras.layers.Conv2D(8, 3, padding="same")
    dense.build((16, 24))
    conv.build((16, 6, 6, 4))

    @tf.function
    def inner(x):  # a function in the graph, as a layer here is that XLA compiles
        return dense(x)

    def step(x, image):
        with tf.GradientTape() as tape:
            tape.watch([x, image])
            loss = tf.reduce_sum(inner(x) ** 2) + tf.reduce_sum(conv(image) ** 2)
        return tape.gradient(loss, [x, image, dense.kernel.value, conv.kernel.value])

    work = count_matmuls(graph_of(step, (16, 24), (16, 6, 6, 4)))
    forward = 2 * 16 * 24 * 32 + 2 * 16 * 6 * 6 * 3 * 3 * 4 * 8
    assert work.complete
    assert sum(matmul.flops for matmul in work.matmuls if matmul.kind == "MatMul") == 3 * 2 * 16 * 24 * 32
    assert work.flops == 3 * forward


def test_what_a_graph_does_not_tell_is_named():
    def loop(x):
        for _ in tf.range(tf.cast(x[0, 0], tf.int32)):
            x = x @ x
        return x

    work = count_matmuls(graph_of(loop, (4, 4)))
    assert (work.flops, work.complete, len(work.loops)) == (2 * 4**3, False, 1)
    work = count_matmuls(graph_of(lambda x: x @ x, (None, 4)))
    assert (work.flops, work.uncounted) == (0, ("matmul",))


def test_the_matmuls_in_the_loops_of_a_recurrent_layer_are_counted_once_and_the_loops_named():
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.LSTM(4), keras.layers.Dense(2)])

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, [weight.value for weight in model.trainable_weights])

    work = count_matmuls(graph_of(step, (8, 5, 3)))
    assert not work.complete
    assert len(work.loops) == 2
    inside = [matmul for matmul in work.matmuls if "while" in matmul.name]
    # Inputs of 3 and states of 4 into four gates of 4.
    assert sum(matmul.flops for matmul in inside if matmul.is_forward) == 2 * 8 * (3 + 4) * 16


def test_of_branches_the_larger_is_counted_and_an_einsum_by_its_letters():
    def branches(x, y):
        return tf.cond(x[0, 0] > 0, lambda: tf.einsum("ab,cb->ac", x, y), lambda: x[:, :2] @ x[:2, :3])

    assert count_matmuls(graph_of(branches, (4, 5), (3, 5))).flops == 2 * 4 * 5 * 3
