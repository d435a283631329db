"""`keras_mp.tune`: what is recommended and said of given figures, and real searches over small models."""

import io
import json
import random
import re
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console
from typer.testing import CliRunner

import keras_mp
from keras_mp._compat import execution, keras_models, runtime
from keras_mp.cli.app import app
from keras_mp.errors import ArgumentError, ConversionError, DistributionError, PolicyError
from keras_mp.hardware import Device, fast_dtypes
from keras_mp.hardware import recommend as recommend_hardware
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.tuning import findings
from keras_mp.tuning.matmul_counts import Product, Work, count_products
from keras_mp.tuning.report import Candidate, Tuning, recommend, why_recommended
from keras_mp.tuning.timing import largest_error, paired_ratio


def candidate(policy="float32", jit_compile=False, steps=1, ratio=1.0, **facts):
    facts = {"step_ms": None if ratio is None else 10 * ratio, "agrees": True, **facts}
    return Candidate(policy, jit_compile, steps, ratio=ratio, **facts)


CURRENT = candidate(current=True)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([candidate("mixed_bfloat16", ratio=0.5)], ("mixed_bfloat16", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.96)], ("float32", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.8, noise=0.15)], ("float32", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.8, noise=0.05)], ("mixed_bfloat16", False, 1)),
        ([candidate("mixed_bfloat16", ratio=0.5, agrees=False)], ("float32", False, 1)),
        ([candidate("mixed_bfloat16", ratio=None)], ("float32", False, 1)),
        (
            [candidate("mixed_float16", ratio=0.50), candidate("mixed_bfloat16", ratio=0.51)],
            ("mixed_bfloat16", False, 1),
        ),
        (
            [candidate("mixed_float16", ratio=0.40), candidate("mixed_bfloat16", ratio=0.50)],
            ("mixed_float16", False, 1),
        ),
        ([candidate("mixed_bfloat16", ratio=0.5), candidate(jit_compile=True, ratio=0.51)], ("float32", True, 1)),
        ([candidate(jit_compile=True, ratio=0.5), candidate(ratio=0.5, steps=16)], ("float32", False, 16)),
    ],
)
def test_the_fastest_that_agrees_is_recommended_unless_a_simpler_one_is_as_fast(others, expected):
    for order in ([CURRENT, *others], [*others, CURRENT]):
        chosen = recommend(order)
        assert (chosen.policy, chosen.jit_compile, chosen.steps_per_execution) == expected


def test_what_is_recommended_is_itself_faster_than_the_model_as_it_is():
    unsure = candidate(
        "mixed_bfloat16", ratio=0.9, noise=0.4
    )  # neither slower than the fastest nor faster than float32
    fast = candidate("mixed_float16", ratio=0.5)
    assert recommend([CURRENT, unsure, fast]) is fast
    assert recommend([CURRENT, unsure]) is CURRENT


def test_what_was_dropped_is_not_recommended():
    dropped = candidate("mixed_bfloat16", ratio=0.5, why="dropped: over 1.5 times the fastest")
    assert recommend([CURRENT, dropped, candidate("mixed_float16", ratio=0.3)]).policy == "mixed_float16"


def test_a_model_in_16_bits_is_left_as_it_is_within_noise_of_float32():
    own = candidate("mixed_bfloat16", ratio=1.02, current=True)
    assert recommend([candidate(), own]) is own
    assert recommend([candidate(ratio=1.0), candidate("mixed_bfloat16", ratio=1.2, current=True)]).policy == "float32"


def test_nothing_is_recommended_where_nothing_agrees():
    assert recommend([candidate(agrees=False), candidate(ratio=None)]) is None


@pytest.mark.parametrize(
    ("chosen", "others", "words"),
    [
        (CURRENT, [], ["Leave the model as it is", "10.00 ms", "nothing else was timed"]),
        (
            CURRENT,
            [candidate("mixed_bfloat16", ratio=2.0)],
            ["mixed_bfloat16 with jit_compile=False (20.00 ms)", "is not"],
        ),
        (CURRENT, [candidate("mixed_bfloat16", ratio=0.97)], ["(9.70 ms)", "not faster by more than 5%"]),
        (
            candidate("mixed_bfloat16", ratio=0.5, error=0.003, converted=True),
            [CURRENT],
            [
                "2.00 times as fast as the model as it is (10.00 ms)",
                "3.0e-03",
                "2.00 times as fast as the fastest in float32, float32 with jit_compile=False (10.00 ms)",
                'model = keras_mp.convert(model, "mixed_bfloat16"), model.jit_compile = False and '
                "model.steps_per_execution = 1",
            ],
        ),
        (candidate(jit_compile=True, ratio=0.5), [CURRENT], ["Type model.compile(..., jit_compile=True"]),
        (
            # What several steps gain in float32 as well is no gain of the dtype's.
            candidate("mixed_bfloat16", steps=16, ratio=0.5, converted=True),
            [CURRENT, candidate(steps=16, ratio=0.6)],
            ["1.20 times as fast as the fastest in float32, float32 with jit_compile=False, steps_per_execution=16"],
        ),
    ],
)
def test_the_reason_says_what_to_type(chosen, others, words):
    text = why_recommended(chosen, [chosen, *others])
    for each in words:
        assert each in text


def test_a_tuning_prints_as_a_table_with_its_sentences():
    others = [candidate("mixed_float16", ratio=None, agrees=None, why="failed: no such thing")]
    others.append(candidate("mixed_bfloat16", ratio=0.5, error=0.4, agrees=False))
    others.append(candidate("mixed_bfloat16", ratio=1.3, converted=True))
    text = str(Tuning("float32", False, 1, "Because.", (CURRENT, *others), ["Firstly [this]."]))
    lines = [line.rstrip().split(maxsplit=6) for line in text.replace("*", "").splitlines()]
    assert [line for line in lines if line and line[0] in ("float32", "mixed_bfloat16", "mixed_float16")][-4:] == [
        ["float32", "no", "1", "10.00", "1.00", "-", "as it is"],
        ["mixed_float16", "no", "1", "-", "-", "-", "failed"],
        ["mixed_bfloat16", "no", "1", "5.00", "0.50", "4.0e-01", "outputs disagree"],
        ["mixed_bfloat16", "no", "1", "13.00", "1.30", "-", "by convert"],
    ]
    assert sum("*" in line for line in text.splitlines()) == 1
    assert "over float32: the median over all rounds" in " ".join(text.split())
    assert text.endswith("Because.\nFirstly [this].")


def test_a_table_fits_a_terminal_of_80_columns():
    others = [candidate("mixed_bfloat16", jit_compile=True, steps=16, ratio=123.4, error=0.4, converted=True)]
    text = io.StringIO()
    Console(file=text, width=80).print(Tuning("float32", False, 1, "Because.", (CURRENT, *others), []).table())
    (row,) = [line for line in text.getvalue().splitlines() if "mixed_bfloat16" in line]
    assert row.split() == ["mixed_bfloat16", "yes", "16", "1234.00", "123.40", "4.0e-01", "by", "convert"]


def test_why_a_candidate_failed_is_a_sentence():
    failed = candidate("mixed_float16", ratio=None, agrees=None, why="failed: there is no kernel: for half")
    assert findings.about_failed([CURRENT, failed]) == [
        "mixed_float16 with jit_compile=False failed: there is no kernel: for half"
    ]


def test_a_product_without_a_kernel_is_named_by_its_layer():
    """The graph is that of a copy, whose name TensorFlow adds a number to."""
    product = Product("gpt_1/block_2/attention_1/einsum/MatMul", "MatMul", 1e5, (8, 8))
    (text,) = findings.about_small_products(Work((product,)), [], frozenset({"gpt", "block_2", "attention"}))
    assert "gpt/block_2/attention/einsum" in text


def test_a_ratio_is_taken_round_by_round():
    ratio, noise = paired_ratio([1.0, 10.0, 2.0, 1.5], [2.0, 20.0, 4.0, 3.0])
    assert (ratio, noise) == (0.5, 0.0)
    assert paired_ratio([1.0, 2.0], [1.0, 1.0]) == (1.5, 1.0)
    # Of normal values it is the standard error of a median.
    noisy = 1 + 0.1 * np.random.default_rng(0).standard_normal(10_000)
    assert paired_ratio(noisy, np.ones(10_000))[1] == pytest.approx(1.2533 * 0.1 / 100, rel=0.03)


def varying(*shape):
    return np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize(
    "expected",
    [
        varying(64, 3),
        1000 + varying(64, 3),
        1000 + varying(64),
        varying(64, 5, 1) + np.array([[1000.0], [2000.0], [3000.0], [0.0], [-5000.0]]),
        varying(64, 3) * [1.0, 10.0, 0.3] + [1000.0, 0.0, 5.0],
        varying(64, 4, 4, 2) + 1000,
    ],
    ids=["plain", "level", "squeezed", "levels-by-position", "units", "images"],
)
def test_an_error_is_relative_to_what_an_output_varies_by_over_the_batch(expected):
    wrong = 0.1 * expected.std(axis=0)
    assert largest_error([expected], [expected]) == 0
    assert largest_error([expected + wrong], [expected]) == pytest.approx(0.1, rel=0.3)
    # The worst output counts.
    assert largest_error([expected, expected + wrong], [expected, expected]) > 0.05


def test_what_float32_cannot_tell_apart_is_no_error():
    expected = 1000 + 0.01 * varying(64, 3)
    assert largest_error([expected + 6e-5], [expected]) == 0
    assert largest_error([expected + 0.01], [expected]) > 0.5


@pytest.mark.parametrize(
    ("expected", "wrong", "error"),
    [
        (np.full((8, 2), 1000.0), 10.0, 0.01),  # judged by its level where nothing varies
        (np.zeros((8, 2)), 0.25, 0.25),
        (np.full((8, 1), 1000.0) + 1e-5 * varying(8, 1), 10.0, 0.01),  # what varies is rounding of float32
        (1000 + varying(1, 64), 0.1, 0.1),  # one row: by what its entries vary by
        (np.array(7.0), 0.7, 0.1),
    ],
    ids=["constant", "zero", "rounding", "one-row", "scalar"],
)
def test_an_output_that_does_not_vary_is_judged_by_its_level(expected, wrong, error):
    assert largest_error([expected + wrong], [expected]) == pytest.approx(error, rel=0.2)


def test_a_feature_that_hardly_varies_is_not_judged_by_next_to_nothing():
    expected = varying(64, 8) * [1, 1, 1, 1, 1, 1, 1e-4, 0]
    assert largest_error([expected + 1e-3], [expected]) == pytest.approx(0.01, rel=0.3)
    # Few rows tell little of what one feature varies by: two alike in one feature do not make its rounding an error.
    expected = varying(2, 256)
    assert largest_error([expected + 3e-3], [expected]) < 0.01


def test_an_error_is_infinite_for_what_is_not_finite_or_of_another_shape():
    reference = [np.array([[100.0, 1.0]]), np.array([[0.5]])]
    assert largest_error([np.array([[np.nan, 1.0]]), np.array([[0.5]])], reference) == np.inf
    assert largest_error([np.array([[100.0, 1.0]])], reference) == np.inf
    masked = np.where(varying(8, 3) > 0.5, -np.inf, varying(8, 3))
    assert largest_error([masked], [masked]) == 0
    assert 0.05 < largest_error([masked + 0.1], [masked]) < 0.5
    assert largest_error([np.array([np.inf])], [np.array([np.inf])]) == 0


def graph_of(function, *shapes):
    return tf.function(function).get_concrete_function(*(tf.TensorSpec(shape) for shape in shapes)).graph


def test_products_are_counted_as_tensorflows_profiler_counts_them():
    def function(x, image):
        dense = tf.matmul(x, x, transpose_a=True)
        image = tf.nn.conv2d(image, tf.ones((3, 3, 4, 8)), strides=2, padding="SAME")
        return dense, image

    graph = graph_of(function, (16, 8), (2, 10, 10, 4))
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    profile = tf.compat.v1.profiler.profile(graph, options={**options, "output": "none"})
    work = count_products(graph)
    assert work.complete
    assert work.flops == profile.total_float_ops > 0


def test_the_products_of_a_backward_pass_are_twice_those_of_the_forward_pass():
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

    work = count_products(graph_of(step, (16, 24), (16, 6, 6, 4)))
    forward = 2 * 16 * 24 * 32 + 2 * 16 * 6 * 6 * 3 * 3 * 4 * 8
    assert work.complete
    assert sum(product.flops for product in work.products if product.kind == "MatMul") == 3 * 2 * 16 * 24 * 32
    assert work.flops == 3 * forward


def test_what_a_graph_does_not_tell_is_named():
    def loop(x):
        for _ in tf.range(tf.cast(x[0, 0], tf.int32)):
            x = x @ x
        return x

    work = count_products(graph_of(loop, (4, 4)))
    assert (work.flops, work.complete, len(work.loops)) == (2 * 4**3, False, 1)
    work = count_products(graph_of(lambda x: x @ x, (None, 4)))
    assert (work.flops, work.uncounted) == (0, ("matmul",))


def test_the_products_in_the_loops_of_a_recurrent_layer_are_counted_once_and_the_loops_named():
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.LSTM(4), keras.layers.Dense(2)])

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        return tape.gradient(loss, [weight.value for weight in model.trainable_weights])

    work = count_products(graph_of(step, (8, 5, 3)))
    assert not work.complete
    assert len(work.loops) == 2
    inside = [product for product in work.products if "while" in product.name]
    # Inputs of 3 and states of 4 into four gates of 4.
    assert sum(product.flops for product in inside if product.is_forward) == 2 * 8 * (3 + 4) * 16


def test_of_branches_the_larger_is_counted_and_an_einsum_by_its_letters():
    def branches(x, y):
        return tf.cond(x[0, 0] > 0, lambda: tf.einsum("ab,cb->ac", x, y), lambda: x[:, :2] @ x[:2, :3])

    assert count_products(graph_of(branches, (4, 5), (3, 5))).flops == 2 * 4 * 5 * 3


AMX = Device("cpu", "Xeon", ("amx_bf16",))
TIMES = [ProductTimes("CPU", 1000, "bfloat16", 20.0, 5.0), ProductTimes("CPU", 1000, "float16", 20.0, 22.0)]


def test_products_are_described_by_dtype():
    bfloat16, float16 = findings.about_products(TIMES)
    assert "20.00 ms in float32 and 5.00 ms in bfloat16 (4.0x): bfloat16 gains enough" in bfloat16
    assert "22.00 ms in float16 (0.9x): float16 gains nothing" in float16


def test_the_share_outside_products_limits_the_gain():
    # 2e9 operations at 1e8 in a millisecond are 20 ms of 40; four times faster they are 5, and the step 25.
    (text,) = findings.about_share(Work((Product("a/MatMul", "MatMul", 2e9),)), 40.0, TIMES)
    assert "By estimate" in text
    assert "50% of a float32 step's 40.00 ms" in text
    assert "products alone make the step 1.6 times as fast; other layers" in text
    (text,) = findings.about_share(Work((Product("a/MatMul", "MatMul", 2e9),), loops=("rnn/while",)), 40.0, TIMES)
    assert "2 billion operations at least" in text
    assert "rnn/while" in text
    (text,) = findings.about_share(Work(()), 40.0, TIMES)
    assert "no matrix product" in text


def test_small_products_are_named_by_their_layers():
    products = (
        Product("net_1/dense_1/MatMul", "MatMul", 1e5, (4, 8)),
        Product("net_1/dense_1_2/MatMul", "MatMul", 1e5, (8, 2)),
        Product("gradient_tape/net_1/dense_1/MatMul", "MatMul", 1e5, (4, 8)),
    )
    kernels = [findings.Kernel("net/dense", (4, 8)), findings.Kernel("net/dense_1", (8, 2))]
    (text,) = findings.about_small_products(Work(products), kernels)
    assert "2 of 2 products" in text
    assert "net/dense, net/dense_1." in text
    # A kernel of three axes, which is multiplied as a matrix; and a product with no kernel, named by its scope.
    attention = (
        Product("net_1/attention_1/query_1/MatMul", "MatMul", 1e5, (8, 16)),
        Product("a/b/MatMul", "MatMul", 1e5),
    )
    (text,) = findings.about_small_products(Work(attention), [findings.Kernel("net/attention/query", (8, 2, 8))])
    assert "net/attention/query, a/b." in text
    large = Product("net_1/large/MatMul", "MatMul", 1e9, (512, 512))
    assert findings.about_small_products(Work((large, products[0])), kernels) == []


def test_sizes_that_are_no_multiples_of_8_are_named_where_the_hardware_cares():
    kernels = [findings.Kernel("net/in", (64, 128)), findings.Kernel("net/out", (128, 10))]
    fast = fast_dtypes([AMX])
    sizes, rows = findings.about_dimensions(kernels, 30, fast)
    assert "1 of 2 kernels have others: net/out (128 x 10)" in sizes
    assert "16 units instead of 10" in sizes
    assert "batch_size=32" in rows
    assert findings.about_dimensions(kernels[:1], 32, fast) == []
    assert findings.about_dimensions(kernels, 30, frozenset()) == []
    # Features and classes are what the data have.
    assert findings.about_dimensions([findings.Kernel("net/out", (6, 10))], 32, fast, frozenset({6, 10})) == []


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (AMX, "Xeon has AMX-BF16"),
        (Device("cpu", "Old"), "CPUs with AMX-BF16 multiply faster in bfloat16, some with AVX512-BF16 do"),
        (Device("gpu", "P100", compute_capability=(6, 0)), "from compute capability 7.0 on"),
    ],
)
def test_what_the_hardware_has_or_lacks_is_said(device, words):
    assert words in findings.about_hardware(recommend_hardware([device]))[0]


@pytest.mark.parametrize(
    "device", [AMX, Device("cpu", "Old"), *(Device("gpu", "X", compute_capability=(n, 0)) for n in (6, 7, 8))]
)
def test_what_the_hardware_has_says_nothing_of_what_to_switch_on(device):
    """The recommendation above it does, of what was timed, and may be another."""
    assert "jit_compile" not in " ".join(findings.about_hardware(recommend_hardware([device])))


@pytest.mark.parametrize(
    ("figures", "is_bottleneck"),
    [((10, 60, 50), True), ((10, 10.5, 2), False), ((10, 10.4, 9), False), ((10, 14, 0.1), False)],
)
def test_an_input_pipeline_is_the_bottleneck_where_steps_wait_for_it(figures, is_bottleneck):
    (text,) = findings.about_pipeline(findings.Pipeline(*figures))
    assert ("is the bottleneck" in text) is is_bottleneck
    assert ("tf.data.AUTOTUNE" in text) is is_bottleneck
    assert f"{figures[0]:.2f} ms with a cached batch" in text


def test_what_was_not_timed_is_named():
    assert findings.about_untimed([CURRENT], 60.0) == []
    left = candidate("mixed_float16", True, ratio=None, why="not timed: it would not be done in time")
    (text,) = findings.about_untimed([CURRENT, left], 10.0)
    assert "Not timed within 10 seconds: mixed_float16 with jit_compile=True" in text
    assert "Give a budget of 40 seconds" in text


def test_what_several_steps_in_a_call_gain_is_said():
    (text,) = findings.about_short_steps([CURRENT, candidate(steps=16, ratio=0.2)])
    assert "10.00 ms in float32 one by one and 2.00 ms with steps_per_execution=16" in text
    assert findings.about_short_steps([CURRENT]) == []
    assert findings.about_short_steps([CURRENT, candidate(steps=16, ratio=0.95)]) == []


# Real searches. Without XLA and with one step in a call they take a few seconds each.
# Nothing here takes so long; on a machine that does other work, a candidate must not be left out for want of time.
QUICK = {"jit_compile": False, "steps_per_execution": 1, "budget": 120}


def batch(rows=8, inputs=4, outputs=2):
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, inputs)), rng.standard_normal((rows, outputs))


def small_model(*layers):
    model = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    model.compile("adam", "mse", metrics=["mae"])
    return model


def everything_of(model):
    values = [variable.numpy() for variable in (*model.variables, *model.optimizer.variables, *model.metrics_variables)]
    values += [variable.numpy() for variable in keras_models.seed_states(model)]
    settings = model.jit_compile, model.steps_per_execution, model.train_function, model.optimizer
    everywhere = keras.config.dtype_policy().name, runtime.remapper_enabled(), random.getstate()
    return values, settings, everywhere, np.random.get_state()[1].tolist()


def test_a_model_is_tuned_and_left_as_it_was_bit_by_bit():
    model = small_model(keras.layers.Dense(16, "gelu"), keras.layers.Dropout(0.5), keras.layers.LayerNormalization())
    model.fit(*batch(), verbose=0)
    before = everything_of(model)
    tuning = keras_mp.tune(model, batch(), **QUICK)
    after = everything_of(model)
    assert len(before[0]) == len(after[0]) > 20
    for value, other in zip(before[0], after[0], strict=True):
        np.testing.assert_array_equal(value, other)
    assert before[1:] == after[1:]

    assert [each.policy for each in tuning.candidates[:1]] == ["float32"]
    assert {each.policy for each in tuning.candidates} == {"float32", "mixed_bfloat16", "mixed_float16"}
    for each in tuning.candidates:
        assert each.agrees
        assert each.step_ms > 0
        assert each.ratio > 0
        assert each.current == (each.policy == "float32") == (not each.converted)
        assert (each.error == 0) == (each.policy == "float32")
    assert tuning.candidates[0].ratio == 1
    chosen = recommend(tuning.candidates)
    assert (tuning.policy, tuning.jit_compile, tuning.steps_per_execution) == (chosen.policy, False, 1)
    told = " ".join(tuning.findings)
    assert "in bfloat16 (" in told
    assert "By estimate" in told
    assert "2 of 2 products" in told
    assert tuning.reason in str(tuning).replace("\n", " ").replace("  ", " ")


def test_a_stock_model_in_16_bits_is_compared_with_its_conversion():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small_model(keras.layers.LayerNormalization())
    tuning = keras_mp.tune(model, batch(), policies=["mixed_bfloat16"], **QUICK)
    assert [(each.policy, each.current, each.converted) for each in tuning.candidates] == [
        ("float32", False, True),
        ("mixed_bfloat16", True, False),
        ("mixed_bfloat16", False, True),
    ]
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


@keras.saving.register_keras_serializable("test_tune")
class Cancelling(keras.layers.Layer):
    """Loses in 16 bits what it is given."""

    def call(self, x):
        return (x + 4096) - 4096


@keras.saving.register_keras_serializable("test_tune")
class InPython(keras.layers.Layer):
    """Runs Python in the graph, which XLA cannot."""

    def call(self, x):
        return tf.ensure_shape(tf.numpy_function(lambda value: value, [x], x.dtype, stateful=False), x.shape)


def test_what_disagrees_with_float32_is_not_recommended():
    tuning = keras_mp.tune(
        small_model(keras.layers.Dense(4), Cancelling()), batch(), policies="mixed_bfloat16", **QUICK
    )
    float32, bfloat16 = tuning.candidates
    assert (float32.agrees, bfloat16.agrees) == (True, False)
    assert bfloat16.error > 0.05
    assert tuning.policy == "float32"
    assert "outputs disagree" in str(tuning)


def test_what_16_bits_make_of_a_level_is_compared_with_what_varies():
    """Targets of 1000 +- 1, as from years or prices: in bfloat16 their steps are 4."""
    model = small_model(Raised())
    tuning = keras_mp.tune(model, batch(64), policies="mixed_bfloat16", **QUICK)
    float32, bfloat16 = tuning.candidates
    assert (float32.agrees, bfloat16.agrees) == (True, False)
    assert bfloat16.error > 0.5


@keras.saving.register_keras_serializable("test_tune")
class Raised(keras.layers.Layer):
    """Adds a level that 16 bits have few steps at."""

    def call(self, x):
        return x + 1000


@keras.saving.register_keras_serializable("test_tune")
class Sampling(keras.layers.Layer):
    """Draws from what it is told the mean and the variance of, at inference too."""

    def __init__(self, how="keras", **kwargs):
        super().__init__(**kwargs)
        self.how = how
        self.generator = keras.random.SeedGenerator(1)

    def get_config(self):
        return {**super().get_config(), "how": self.how}

    def call(self, z):
        mean, log_variance = keras.ops.split(z, 2, -1)
        shape = keras.ops.shape(mean)
        if self.how == "tf":
            drawn = tf.random.normal(shape, dtype=mean.dtype)
        elif self.how == "float32":  # which 16 bits cannot be multiplied with
            drawn = tf.random.normal(shape)
            return tf.add(mean, tf.exp(0.5 * log_variance) * drawn)
        else:
            seed = self.generator if self.how == "generator" else None
            drawn = keras.random.normal(shape, dtype=mean.dtype, seed=seed)
        return mean + keras.ops.exp(0.5 * log_variance) * drawn


@pytest.mark.parametrize("how", ["keras", "generator", "tf", "float32"])
def test_a_model_that_samples_is_tuned_and_said_to_sample(how):
    inputs = keras.Input((16,))
    outputs = keras.layers.Dense(16, "sigmoid")(Sampling(how)(keras.layers.Dense(8)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "binary_crossentropy")
    x = (np.random.default_rng(0).random((32, 16)) > 0.5).astype("float32")
    tuning = keras_mp.tune(model, (x, x), policies=["float32", "mixed_bfloat16"], **QUICK)
    assert [each.agrees for each in tuning.candidates if not each.why.startswith("failed")] in ([True], [True] * 2)
    (said,) = [each for each in tuning.findings if "samples" in each]
    assert "two runs in float32" in said


@pytest.mark.parametrize("what", ["wrong", "nan"])
def test_a_candidate_that_draws_wrong_numbers_is_ruled_out(what):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(Failing16(what)(Sampling()(keras.layers.Dense(4)(inputs)))))
    model.compile("sgd", "mse")
    tuning = keras_mp.tune(model, batch(32), policies="mixed_bfloat16", **QUICK)
    assert [each.agrees for each in tuning.candidates] == [True, False]


def test_a_model_that_samples_what_is_not_a_number_is_said_to():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Lambda(keras.ops.log)(Sampling()(keras.layers.Dense(4)(inputs))))
    model.compile("sgd", "mse")
    with pytest.raises(ArgumentError, match="outputs are not finite"):
        keras_mp.tune(model, batch(32), **QUICK)


@keras.saving.register_keras_serializable("test_tune")
class Failing16(keras.layers.Layer):
    """Right in float32 alone."""

    def __init__(self, what, **kwargs):
        super().__init__(**kwargs)
        self.what = what

    def get_config(self):
        return {**super().get_config(), "what": self.what}

    def call(self, x):
        if keras.backend.standardize_dtype(x.dtype) == "float32":
            return x
        return x * float("nan") if self.what == "nan" else x + 30


def test_a_candidate_that_fails_is_reported_with_the_reason():
    model = keras.Sequential([keras.Input((4,)), InPython(), keras.layers.Dense(2)])
    model.layers[0].trainable = False
    model.compile("sgd", "mse")
    tuning = keras_mp.tune(model, batch(), policies="float32", steps_per_execution=1, budget=30)
    plain, compiled = tuning.candidates
    assert (plain.jit_compile, plain.why) == (False, "")
    assert compiled.jit_compile
    assert compiled.step_ms is None
    assert compiled.why.startswith("failed: ")
    assert "PyFunc" in compiled.why or "XLA" in compiled.why
    assert tuning.jit_compile is False


NOTES = set()


@keras.saving.register_keras_serializable("test_tune")
class Noting(keras.layers.Layer):
    """Notes, when a step is traced, what it computes in and whether grappler may fuse."""

    def call(self, x, training=False):
        if training and execution.recording():
            NOTES.add((self.compute_dtype, runtime.remapper_enabled()))
        return x


def test_float16_on_a_cpu_does_without_the_fusion_that_others_are_timed_with():
    runtime.set_remapper(True)
    NOTES.clear()
    policies = ["mixed_float16", "mixed_bfloat16"]
    keras_mp.tune(small_model(keras.layers.Dense(4), Noting()), batch(), policies=policies, **QUICK)
    on_cpu = not keras_mp.detect().accelerators
    assert {("float32", True), ("bfloat16", True), ("float16", not on_cpu)} <= NOTES
    assert ("bfloat16", False) not in NOTES
    assert ("float32", False) not in NOTES
    assert runtime.remapper_enabled()


def test_a_slow_dataset_is_found_to_be_the_bottleneck():
    def slowly(x, y):
        def wait(value):
            time.sleep(0.05)
            return value

        return tf.ensure_shape(tf.numpy_function(wait, [x], x.dtype), x.shape), y

    x, y = batch(rows=24)
    dataset = tf.data.Dataset.from_tensor_slices((x.astype("float32"), y.astype("float32"))).batch(8).map(slowly)
    model = keras.Sequential([keras.layers.Dense(3, "relu"), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    tuning = keras_mp.tune(model, dataset, policies="float32", **QUICK)
    assert "The input pipeline is the bottleneck" in tuning.findings[0]
    assert "num_parallel_calls=tf.data.AUTOTUNE" in tuning.findings[0]
    assert not model.built


def test_dictionaries_and_weights_go_in_as_fit_takes_them():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    outputs = {"c": keras.layers.Dense(2, name="c")(joined), "d": keras.layers.Dense(1, name="d")(joined)}
    model = keras.Model(inputs, outputs)
    model.compile("adam", {"c": "mse", "d": "mae"})
    x = {"a": np.ones((8, 4)), "b": np.ones((8, 3))}
    y = {"c": np.ones((8, 2)), "d": np.ones((8, 1))}
    weights = {"c": np.ones(8), "d": np.ones(8)}
    model.fit(x, y, sample_weight=weights, verbose=0)
    tuning = keras_mp.tune(model, (x, y, weights), policies="mixed_float16", **QUICK)
    assert [each.policy for each in tuning.candidates] == ["float32", "mixed_float16"]
    assert all(each.agrees and each.step_ms for each in tuning.candidates)


def test_within_no_time_the_answer_is_a_partial_one():
    tuning = keras_mp.tune(small_model(), batch(), budget=0.001)
    assert (tuning.policy, tuning.jit_compile, tuning.steps_per_execution) == ("float32", False, 1)
    assert tuning.candidates[0].step_ms > 0
    assert all(each.why.startswith("not timed") for each in tuning.candidates[1:])
    (told,) = [each for each in tuning.findings if each.startswith("Not timed within 0.001 seconds")]
    assert "mixed_bfloat16 with jit_compile=True" in told


def compiled(**settings):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse", **settings)
    return model


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (
            lambda: (keras.Sequential([keras.layers.Dense(2)]), batch()),
            {},
            ArgumentError,
            'model.compile("adam", loss)',
        ),
        (lambda: (compiled(run_eagerly=True), batch()), {}, ArgumentError, "run_eagerly=False"),
        (lambda: ("model.keras", batch()), {}, ArgumentError, "keras_mp.load_model(path)"),
        (lambda: (compiled(), batch()[0]), {}, ArgumentError, "float64(8, 4). For a model that takes x alone"),
        (lambda: (compiled(), batch() * 2), {}, ArgumentError, "(x, y) or (x, y, sample_weight)"),
        (lambda: (compiled(), (batch()[0], batch(rows=6)[1])), {}, ArgumentError, "(8, 4), (6, 2)"),
        (lambda: (compiled(), batch(inputs=5)), {}, ArgumentError, "cannot be trained on this batch"),
        (lambda: (compiled(), batch(rows=0)), {}, ArgumentError, "has no rows"),
        (lambda: (compiled(), (batch()[0], np.array(["a"] * 8))), {}, ArgumentError, "such as ['a']"),
        (lambda: (compiled(), [each.tolist() for each in batch()]), {}, ArgumentError, "np.array(x)"),
        (lambda: (compiled(), batch(rows=32)[0].tolist()), {}, ArgumentError, "dataset[0] or next(generator)"),
        (lambda: (compiled(), (batch()[0] * np.nan, batch()[1])), {}, ArgumentError, "outputs are not finite"),
        (lambda: (compiled(), (batch()[0], batch()[1] * np.nan)), {}, ArgumentError, "loss is not finite"),
        (lambda: (compiled(), tf.data.Dataset.from_tensor_slices(batch()).take(0)), {}, ArgumentError, "has no batch"),
        (lambda: (compiled(), batch()), {"policies": "mixed_flot16"}, PolicyError, 'Did you mean "mixed_float16"?'),
        (lambda: (compiled(), batch()), {"policies": []}, ArgumentError, "at least one"),
        (lambda: (compiled(), batch()), {"jit_compile": "auto"}, ArgumentError, "(True, False)"),
        (lambda: (compiled(), batch()), {"steps_per_execution": 0}, ArgumentError, "from 1 on"),
        (lambda: (compiled(), batch()), {"budget": 0}, ArgumentError, "budget=60"),
        (lambda: (compiled(), batch()), {"budget": "a"}, ArgumentError, "budget=60"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_words(arguments, options, error, words):
    policy = keras.config.dtype_policy()
    with pytest.raises(error) as raised:
        keras_mp.tune(*arguments(), **options)
    assert words in str(raised.value)
    assert keras.config.dtype_policy() == policy


@pytest.mark.parametrize("optimizer", ["sgd", "ours"])
def test_steps_that_diverge_on_the_one_batch_leave_the_others_timed(optimizer):
    """What `fit` never meets, for it never takes hundreds of steps on one batch."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    sgd = keras.optimizers.SGD(1.0)
    model.compile(sgd if optimizer == "sgd" else keras_mp.LossScaleOptimizer(sgd), "mse")
    x, y = batch()
    tuning = keras_mp.tune(model, (3 * x, 3 * y), **QUICK)
    assert tuning.candidates[0].step_ms is not None
    # What multiplies faster here is tried first.
    assert sorted(each.policy for each in tuning.candidates) == ["float32", "mixed_bfloat16", "mixed_float16"]


def test_a_candidate_that_overflows_is_ruled_out_and_the_others_are_timed():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(64), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(1e-12), "mse")
    x, y = batch()
    tuning = keras_mp.tune(model, (1e6 * x, y), **QUICK)
    by_policy = {each.policy: each for each in tuning.candidates}
    assert by_policy["mixed_float16"].agrees is False
    assert by_policy["float32"].agrees
    assert by_policy["mixed_bfloat16"].step_ms is not None


def test_heads_of_attention_are_one_size_with_their_width():
    inputs = keras.Input((8, 16))
    model = keras.Model(inputs, keras.layers.MultiHeadAttention(4, 8)(inputs, inputs))
    model.compile("sgd", "mse")
    x = np.ones((8, 8, 16), "float32")
    tuning = keras_mp.tune(model, (x, x), policies="float32", **QUICK)
    assert not any("multiples of 8" in each for each in tuning.findings)


def test_a_model_with_replicas_is_refused(mirrored):
    with mirrored(2).scope():
        model = compiled()
    with pytest.raises(DistributionError, match="outside strategy.scope"):
        keras_mp.tune(model, batch())


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "program_to_tune.py").write_text(
        "import keras, numpy as np\n"
        "def made():\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])\n"
        "    model.compile('sgd', 'mse')\n"
        "    return model, (np.ones((8, 4)), np.ones((8, 2)))\n"
        "def uncompiled():\n"
        "    return keras.Sequential([keras.Input((4,))]), (np.ones((8, 4)), np.ones((8, 2)))\n"
        "def alone():\n"
        "    return made()[0]\n"
        "def three():\n"
        "    return made()[0], 1, 2\n"
        "def fails():\n"
        "    return 1 / 0\n"
        "def needs(rows):\n"
        "    return made()\n"
    )
    (tmp_path / "program_that_imports.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def run(*arguments):
    return CliRunner().invoke(app.app, ["tune", *arguments], env={"COLUMNS": "200"})


def test_the_command_prints_a_table_or_json(program):
    result = run("program_to_tune:made", "--policy", "float32", "--budget", "0.01")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.output.splitlines() if line.strip().startswith("* ")]
    assert row.split()[1:4] == ["float32", "no", "1"]
    assert "Leave the model as it is" in result.output
    told = json.loads(run("program_to_tune:made", "--policy", "float32", "--budget", "0.01", "--json").stdout)
    assert (told["policy"], told["jit_compile"], told["steps_per_execution"]) == ("float32", False, 1)
    assert told["candidates"][0]["step_ms"] > 0
    assert told["candidates"][0]["current"] is True
    assert any("in bfloat16 (" in finding for finding in told["findings"])


def test_the_command_shows_where_a_function_fails_and_not_how_it_was_called(program):
    command = [sys.executable, "-m", "keras_mp", "tune", "program_to_tune:fails"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert re.findall('File ".*/(.*)", line', ran.stderr) == ["program_to_tune.py"]
    assert ran.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("program_to_tune", 2, "Expected MODULE:FUNCTION"),
        ("program_to_tune.py:made", 2, "Expected MODULE:FUNCTION"),
        ("program_of_yours:made", 2, "No module named 'program_of_yours'"),
        ("./program_to_tune:made", 2, "without a path and without .py"),
        ("program_that_imports:made", 2, "was found, but one of its imports was not"),
        ("program_to_tune:needs", 2, "must take no arguments: missing a required argument: 'rows'"),
        ("program_to_tune:three", 2, "returned a tuple of 3. Expected (model, batch)"),
        ("program_to_tune:mad", 2, "It has: made, uncompiled, alone, three, fails, needs."),
        ("program_to_tune:alone", 2, "returned Sequential. Expected (model, batch)"),
        ("program_to_tune:uncompiled", 1, 'model.compile("adam", loss)'),
    ],
)
def test_the_command_says_what_is_missing(program, source, code, words):
    result = run(source)
    assert result.exit_code == code
    assert words in " ".join(result.output.replace("│", "").split())


def test_a_dataset_that_fails_after_its_first_batch_is_told():
    def batches():
        yield np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
        raise ValueError("the second batch is not there")

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    signature = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 2)))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    tuning = keras_mp.tune(model, dataset, policies="float32", jit_compile=False, steps_per_execution=1, budget=30)
    assert tuning.policy == "float32"
    (told,) = [finding for finding in tuning.findings if "failed after its first batch" in finding]
    assert "the second batch is not there" in told


def test_what_cannot_be_trained_is_told_whole():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ArgumentError, match=r"label value of 7 which is outside the valid range of \[0, 2\)"):
        keras_mp.tune(model, (np.ones((8, 4)), np.full(8, 7)), policies="float32", budget=10)


def test_a_metric_that_cannot_be_copied_is_named():
    class Needy(keras.metrics.Mean):
        def __init__(self, what):
            super().__init__()

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse", metrics=[Needy(1)])
    with pytest.raises(ConversionError, match="of class Needy cannot be made again"):
        keras_mp.tune(model, (np.ones((8, 4)), np.ones((8, 2))), policies="float32", budget=10)
