"""Sums, means and maxima as they are taken where XLA compiles for a CPU, and operations that keep little."""

import numpy as np
import pytest
import tensorflow as tf

from keras_mp import fusion

REDUCTIONS = {"total": (fusion.total, np.sum), "mean": (fusion.mean, np.mean), "largest": (fusion.largest, np.max)}
SHAPES = {
    "last": ((6, 40), (1,)),
    "last, of 256": ((3, 2, 256), (2,)),
    "first": ((40, 6), (0,)),
    "first two": ((5, 40, 6), (0, 1)),
    "middle": ((4, 40, 6), (1,)),
    "two in the middle": ((3, 5, 7, 6), (1, 2)),
    "apart": ((5, 4, 6), (0, 2)),
    "all": ((5, 4, 6), (0, 1, 2)),
    "longer than one product": ((2, 15000, 3), (1,)),
    "long and prime": ((2, 4099), (1,)),
    "a single one": ((1, 1), (1,)),
    "a vector": ((40,), (0,)),
    "none": ((5, 0, 6), (1,)),
    "no rows": ((0, 5, 6), (1,)),
}


@pytest.mark.parametrize("batch", ["known", "unknown"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_against_float64(name, case, compiled, batch):
    reduce, reference = REDUCTIONS[name]
    shape, axes = SHAPES[case]
    if name != "total" and 0 in [shape[axis] for axis in axes]:
        return  # of nothing there is only a sum
    x = np.random.default_rng(0).normal(1.0, 1.0, shape).astype("float32")
    run = fusion.fusible(lambda x: reduce(x, axes))(compiled)
    specification = tf.TensorSpec(shape if batch == "known" else (None, *shape[1:]))
    y = tf.function(run, input_signature=[specification])(x)
    expected = reference(x.astype("float64"), axis=axes, keepdims=True)
    assert y.shape == expected.shape
    # TensorFlow's own sum over 15,000 rows is the less exact one.
    np.testing.assert_allclose(y, expected, rtol=2e-6 if compiled else 1e-5, atol=1e-30)


def test_a_long_sum_of_large_numbers_keeps_its_digits():
    x = np.random.default_rng(0).normal(60000, 100, (4, 60000)).astype("float32")
    y = fusion.fusible(lambda x: fusion.mean(x, (1,)))(True)(tf.constant(x))
    # One sum after the other would be off by more than a unit; float32 tells numbers of this size 0.004 apart.
    np.testing.assert_allclose(y[:, 0], x.astype("float64").mean(1), atol=0.02)


def test_sums_in_a_compiled_step_are_products_with_ones():
    """What makes them fast on a CPU; without it the benchmarks would show it, and no other test."""
    run = fusion.fusible(lambda x: fusion.total(tf.exp(x), (1,)))(True)
    assert " dot(" in run.experimental_get_compiler_ir(tf.ones([8, 512]))(stage="hlo")
    whole = tf.function(lambda x: fusion.total(tf.exp(x), (1,)), jit_compile=True)  # as for TPU and GPU
    assert " dot(" not in whole.experimental_get_compiler_ir(tf.ones([8, 512]))(stage="hlo")


@pytest.mark.parametrize("jit_compile", [False, True], ids=["", "XLA"])
@pytest.mark.parametrize("keeps_output", [False, True], ids=["input", "output"])
def test_second_derivatives_of_operations(keeps_output, jit_compile):
    """exp, whose gradient is known from input and output alike; what is kept counts as what it was computed from."""
    exponential = fusion.operation(
        tf.exp,
        (lambda y, upstream: y * upstream) if keeps_output else (lambda x, upstream: tf.exp(x) * upstream),
        keeps_output=keeps_output,
    )

    @tf.function(jit_compile=jit_compile)
    def derivatives(x):
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                y = exponential(x)
            slope = first.gradient(y, x)
        return y, slope, second.gradient(slope, x)

    x = tf.constant([[0.5, -1.0]])
    for actual in derivatives(x):
        np.testing.assert_allclose(actual, np.exp(x), rtol=1e-6)
