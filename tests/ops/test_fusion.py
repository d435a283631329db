"""Sums, means and maxima as they are taken where XLA compiles for a CPU, and operations that keep little."""

import numpy as np
import pytest
import tensorflow as tf

from keras_mp import activations, layers
from keras_mp.ops import fusion
from tests.helpers.derivatives import early_operations, with_two_derivatives

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

    def operations(function):
        graph = tf.function(function).get_concrete_function(tf.TensorSpec([8, 512])).graph.as_graph_def()
        return {node.op for part in graph.library.function for node in part.node_def} | {n.op for n in graph.node}

    total = lambda x: fusion.total(tf.exp(x), (1,))  # noqa: E731
    assert {"MatMul", "BatchMatMulV2"} & operations(fusion.fusible(total)(True))
    assert not {"MatMul", "BatchMatMulV2"} & operations(total)  # as for TPU and GPU


LAYERS = {
    "LayerNormalization": lambda: layers.LayerNormalization(epsilon=np.float64(1e-3)),  # a NumPy number is one, too
    "GroupNormalization": lambda: layers.GroupNormalization(2),
    "Softmax": layers.Softmax,
    "attention": lambda: layers.Attention(),
    "gelu": lambda: activations.gelu,
}


@pytest.mark.parametrize("branch", ["cond", "switch_case"])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_inside_a_branch(name, branch):
    """As for a layer that is sometimes left out."""
    layer = LAYERS[name]()
    x = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 4)), "float32")

    def run(x):
        x = 2 * x  # an input that the branch has computed itself
        return layer([x, x]) if name == "attention" else layer(x)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            if branch == "cond":
                y = tf.cond(tf.reduce_sum(tf.abs(x)) > 0, lambda: run(x), lambda: 0 * run(x))
            else:
                y = tf.switch_case(tf.cast(tf.reduce_sum(tf.abs(x)) > 0, "int32"), [lambda: 0 * run(x), lambda: run(x)])
            loss = tf.reduce_sum(tf.sin(y))
        return tape.gradient(loss, x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(tf.sin(run(x)))
    np.testing.assert_allclose(tf.function(step)(x), tape.gradient(loss, x), atol=1e-5)


def gradients_of(name, dtype="mixed_bfloat16"):
    """A layer's training step of one input, and the input."""
    layer = {
        "LayerNormalization": layers.LayerNormalization,
        "BatchNormalization": lambda **settings: layers.BatchNormalization(axis=1, **settings),
        "UnitNormalization": layers.UnitNormalization,
        "Softmax": layers.Softmax,
        "Attention": lambda **settings: layers.Attention(dropout=0.5, seed=0, **settings),
        "gelu": lambda dtype: activations.gelu,
    }[name](dtype=dtype)

    def run(x):
        if name == "Attention":
            return layer([x, x], training=False)
        return layer(x, training=True) if name == "BatchNormalization" else layer(x)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = run(x)
            loss = tf.reduce_sum(tf.sin(tf.cast(y, "float32")))
        return tape.gradient(loss, x)

    x = tf.constant(np.random.default_rng(0).normal(size=(2, 32, 16)), "bfloat16")
    run(x)  # makes the weights
    return run, step, x


HELD = ["LayerNormalization", "BatchNormalization", "UnitNormalization", "Softmax", "Attention", "gelu"]


@pytest.mark.parametrize("name", HELD)
def test_what_is_kept_is_held_where_xla_compiles_both_passes_and_nowhere_else(name):
    run, step, x = gradients_of(name)

    def barriers(function):
        compiled = tf.function(function, jit_compile=True, autograph=False)
        lines = compiled.experimental_get_compiler_ir(x)(stage="hlo").splitlines()
        return [line for line in lines if "opt-barrier(" in line]

    def kinds(function):
        graph = tf.function(function, autograph=False).get_concrete_function(x).graph.as_graph_def()
        return {n.op for n in graph.node} | {n.op for part in graph.library.function for n in part.node_def}

    held = barriers(step)
    size = "32,32" if name == "Attention" else "32,16"  # the probabilities, or the input or output
    assert any("bf16[" in line and size in line for line in held), held
    assert not any("f32[" in line and size in line for line in held), held
    assert barriers(run) == []
    assert "XlaOptimizationBarrier" not in kinds(step) | kinds(run)
    np.testing.assert_allclose(
        tf.cast(tf.function(step, jit_compile=True)(x), "float32"), tf.cast(step(x), "float32"), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize(("name", "kept"), [("gelu", 1), ("LayerNormalization", 1), ("Softmax", 2)])
def test_a_16_bit_gradient_is_held_as_well(name, kept):
    # Accelerators' compilers leave out a rounding that a cast follows, which the CPU's does not: so the text is read.
    _, step, x = gradients_of(name)
    compiled = tf.function(lambda x: tf.cast(step(x), "float32"), jit_compile=True, autograph=False)
    lines = compiled.experimental_get_compiler_ir(x)(stage="hlo").splitlines()
    held = [line for line in lines if "opt-barrier(" in line and "bf16[2,32,16]" in line]
    assert len(held) == kept + 1, held


def test_a_tape_outside_of_what_xla_compiles():
    run, step, x = gradients_of("LayerNormalization", "float32")
    x = tf.cast(x, "float32")
    compiled = tf.function(run, jit_compile=True, autograph=False)
    with tf.GradientTape() as second:
        second.watch(x)
        with tf.GradientTape() as first:
            first.watch(x)
            loss = tf.reduce_sum(tf.sin(compiled(x)))
        slope = first.gradient(loss, x)
        penalty = tf.reduce_sum(tf.square(slope))
    with tf.GradientTape() as plain:
        plain.watch(x)
        expected = tf.reduce_sum(tf.square(step(x)))
    np.testing.assert_allclose(penalty, expected, rtol=1e-4)
    np.testing.assert_allclose(second.gradient(penalty, x), plain.gradient(expected, x), rtol=1e-3, atol=1e-4)


def test_tensors_of_unknown_rank():
    @tf.function(input_signature=[tf.TensorSpec(None)])
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activations.silu(x)
        return tape.gradient(y, x)

    np.testing.assert_allclose(step(tf.zeros([2, 3])), np.full((2, 3), 0.5))


@pytest.mark.parametrize("jit_compile", [False, True], ids=["", "XLA"])
@pytest.mark.parametrize("keeps_output", [False, True], ids=["input", "output"])
def test_second_derivatives_of_operations(keeps_output, jit_compile):
    """exp, whose gradient is known from input and output alike; what is kept counts as what it was computed from."""
    exponential = fusion.operation(
        tf.exp,
        (lambda y, upstream: y * upstream) if keeps_output else (lambda x, upstream: tf.exp(x) * upstream),
        keeps_output=keeps_output,
    )

    x = tf.constant([[0.5, -1.0]])
    for actual in with_two_derivatives(lambda x: (exponential(x),), jit_compile)(x):
        np.testing.assert_allclose(actual, np.exp(x), rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["", "XLA"])
def test_second_derivatives_where_a_statistic_is_kept(jit_compile):
    """x times its sum, of which the gradient to x_i of the sum over all is twice the sum, and that one's 2."""
    operation = fusion.operation(
        lambda x: (x * tf.reduce_sum(x), tf.reduce_sum(x)),
        lambda x, total, upstream: upstream * total + tf.reduce_sum(upstream * x),
        keeps_statistics=True,
    )

    x = np.array([0.5, -1.0, 2.0], "float32")
    y, total, slope, curvature = with_two_derivatives(operation, jit_compile)(tf.constant(x))
    np.testing.assert_allclose(y, x * 1.5)
    assert float(total) == 1.5
    np.testing.assert_allclose(slope, [3.0] * 3)
    np.testing.assert_allclose(curvature, [6.0] * 3)


def test_rounding_to_bfloat16_is_the_cast():
    """Of ties, of what overflows, and of NaN whose bits are all ones, which would carry into the sign."""
    generator = np.random.default_rng(0)
    bits = np.concatenate(
        [
            generator.integers(0, 2**32, 100_000, dtype=np.uint32),
            generator.integers(0, 2**16, 20_000, dtype=np.uint32) << 16 | 0x8000,  # ties
            np.array([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 1], "uint32"),
            np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000], "uint32"),  # NaN
        ]
    )
    # XLA takes subnormal numbers of float32 for zero on a CPU.
    x = bits.view("float32")
    x = x[~((np.abs(x) < 2.0**-126) & (x != 0))]
    rounded = fusion.fusible(lambda x: fusion.rounded(x, "bfloat16"))(True)(tf.constant(x))
    expected = tf.cast(x, "bfloat16")
    assert rounded.dtype == expected.dtype
    np.testing.assert_array_equal(tf.cast(rounded, "float32"), tf.cast(expected, "float32"))
    assert np.isnan(x).sum() > 100


@pytest.mark.parametrize("name", ["LayerNormalization", "RMSNormalization", "UnitNormalization"])
def test_where_sizes_are_not_known_no_copy_is_made_before_the_gradient_comes(name):
    """TensorFlow would take the cast to float32 of both passes for one, and keep what it makes."""
    layer = getattr(layers, name)(dtype="mixed_bfloat16")
    layer.build((2, 3, 4, 8))
    assert early_operations(layer, (2, 3, 4, 8), "bfloat16", known=False) == []
