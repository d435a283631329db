"""The first two derivatives of a function, by two tapes."""

import tensorflow as tf


def with_two_derivatives(function, jit_compile):
    """A graph function that answers what another does, and the two derivatives of the sum of its first answer.

    Args:
        function: from a tensor to a tuple of tensors.
        jit_compile: whether XLA compiles all of it.
    """

    @tf.function(jit_compile=jit_compile)
    def derivatives(x):
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                answers = function(x)
            slope = first.gradient(answers[0], x)
        return *answers, slope, second.gradient(slope, x)

    return derivatives
