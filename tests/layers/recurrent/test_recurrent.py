"""Recurrent layers and cells: the contract, and the states and sums of gradients that stock Keras keeps in 16 bits."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract, gradients

NAMES = ("LSTM", "GRU", "SimpleRNN")


def case(name, shape=(2, 4, 3), units=3, **arguments):
    # Weights of both signs: gates that are all open or shut have no gradient. Outputs go through rounded products once
    # a step, so their rounding adds up over the steps: twice what rounding the output alone allows.
    return Case(
        functools.partial(getattr(layers, name), units, **arguments),
        functools.partial(getattr(keras.layers, name), units, **arguments),
        [shape],
        weights=(-0.5, 0.5),
        scale=0.5,
        random=bool(arguments.get("dropout") or arguments.get("recurrent_dropout")),
        tolerance={"bfloat16": 3.2e-2, "float16": 4e-3},
    )


def rnn_case(make, **arguments):
    given = {"shapes": [(2, 4, 3)], "weights": (-0.5, 0.5), "scale": 0.5}
    return Case(
        lambda: layers.RNN(make(layers), **arguments),
        lambda: keras.layers.RNN(make(keras.layers), **arguments),
        tolerance={"bfloat16": 3.2e-2, "float16": 4e-3},
        **given,
    )


CASES = {
    **{
        f"{name}, {what}": case(name, **arguments)
        for name in NAMES
        for what, arguments in (
            ("last", {}),
            ("sequences", {"return_sequences": True}),
            ("backwards", {"go_backwards": True, "return_sequences": True, "use_bias": False}),
            ("dropout", {"dropout": 0.3, "recurrent_dropout": 0.3}),
        )
    },
    "LSTM, other activations": case("LSTM", activation="relu", recurrent_activation="hard_sigmoid"),
    "LSTM, unrolled": case("LSTM", unroll=True, shape=(2, 3, 3)),
    "GRU, zero for mask": case("GRU", zero_output_for_mask=True, return_sequences=True),
    "GRU, reset before": case("GRU", reset_after=False, return_sequences=True),
    "SimpleRNN, linear": case("SimpleRNN", activation=None),
    **{
        f"RNN of {name}": rnn_case(lambda of, name=name: getattr(of, name)(4, name="cell"), return_sequences=True)
        for name in ("LSTMCell", "GRUCell", "SimpleRNNCell")
    },
    "RNN of a stack": rnn_case(
        lambda of: of.StackedRNNCells([of.GRUCell(4, name="a"), of.SimpleRNNCell(3, name="b")], name="cell"),
        go_backwards=True,
    ),
    # As Keras does, where the cell is not ours.
    "RNN of a stock cell": rnn_case(lambda of: keras.layers.LSTMCell(4, name="cell")),
}


@contract(CASES, firsts=["LSTM, last", "GRU, sequences", "SimpleRNN, backwards", "RNN of LSTMCell"])
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def rounded(x):
    """What bfloat16 and float16 both hold, so that only the computation differs, in float64."""
    return tf.cast(tf.cast(tf.cast(x, "bfloat16"), "float16"), "float64").numpy()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def remembering(name, units):
    """Weights with which a state forgets about a part in 500 a step: kernel, recurrent kernel, bias."""
    parts = {"LSTM": 4, "GRU": 3}[name]
    rng = np.random.default_rng(1)
    kernel, recurrent = rng.normal(0, 0.3, (4, parts * units)), rng.normal(0, 0.05, (units, parts * units))
    bias = np.zeros(parts * units)
    if name == "LSTM":
        bias[:units], bias[units : 2 * units] = -4, 7
    else:
        bias = np.stack([bias, bias])
        bias[0, :units] = 6
    return [rounded(each) for each in (kernel, recurrent, bias)]


def in_numpy(name, x, kernel, recurrent, bias):
    """The states after each step, in float64: batch, steps, units, of the cell state and the output."""
    h = c = np.zeros((len(x), len(recurrent)))
    hs, cs = [], []
    for step in range(x.shape[1]):
        if name == "LSTM":
            i, f, g, o = np.split(x[:, step] @ kernel + h @ recurrent + bias, 4, -1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            z, r, g = np.split(x[:, step] @ kernel + bias[0], 3, -1)
            z_h, r_h, g_h = np.split(h @ recurrent + bias[1], 3, -1)
            z = sigmoid(z + z_h)
            h = z * h + (1 - z) * np.tanh(g + sigmoid(r + r_h) * g_h)
        hs.append(h)
        cs.append(c)
    return np.stack(hs, 1), np.stack(cs, 1)


def check_long_sequence(make, name, policy):
    rng = np.random.default_rng(0)
    x, weights = rounded(rng.normal(0.3, 1.0, (4, 1500, 4))), remembering(name, 8)
    expected, _ = in_numpy(name, x, *weights)
    layer = make(8, return_sequences=True, dtype=policy)
    layer.build(x.shape)
    layer.set_weights(weights)
    y = tf.function(layer)(tf.cast(x, layer.compute_dtype))
    # Stock: 0.5 (LSTM) and 0.13 (GRU) in bfloat16, 0.03 and 0.011 in float16.
    assert_close(y, expected, {"mixed_bfloat16": 3e-2, "mixed_float16": 3e-3, "float32": 1e-5}[policy])


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_a_state_goes_on_moving(name, policy):
    check_long_sequence(getattr(layers, name), name, policy)


@pytest.mark.stock_defect
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_stock_state_goes_on_moving(name, policy):
    check_long_sequence(getattr(keras.layers, name), name, policy)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_cells_keep_a_float32_state(name):
    check_long_sequence(
        lambda units, dtype, **arguments: layers.RNN(
            getattr(layers, f"{name}Cell")(units, dtype=dtype), dtype=dtype, **arguments
        ),
        name,
        "mixed_bfloat16",
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_stacked_cells_keep_their_float32_states(stacked):
    """The first cell passes on what comes in, the second remembers."""
    weights = remembering("LSTM", 8)
    x = rounded(np.random.default_rng(0).uniform(-0.9, 0.9, (2, 1500, 4)))
    cells = [
        layers.SimpleRNNCell(4, activation=None, use_bias=False, dtype="mixed_bfloat16"),
        layers.LSTMCell(8, dtype="mixed_bfloat16"),
    ]
    cell = layers.StackedRNNCells(cells, dtype="mixed_bfloat16") if stacked else cells
    layer = layers.RNN(cell, return_sequences=True, return_state=True, dtype="mixed_bfloat16")
    layer.build(x.shape)
    layer.set_weights([np.eye(4), np.zeros((4, 4)), *weights])
    y, *_ = tf.function(layer)(tf.constant(x))
    assert_close(y, in_numpy("LSTM", x, *weights)[0], 3e-2)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_gradients_of_weights_are_summed_over_all_steps(policy):
    """A linear layer whose state goes nowhere, given ones: each gradient to a weight is a sum of as many ones.

    Summed in bfloat16 they would end at 256 or 512. Stock Keras is right here: it rounds the kernel in each step anew,
    so that the gradients of the steps are float32 again when they are added.
    """
    steps = 2000
    layer = layers.SimpleRNN(3, activation=None, return_sequences=True, dtype=policy)
    layer.build((2, steps, 3))
    layer.set_weights([np.eye(3), np.zeros((3, 3)), np.zeros(3)])
    x = tf.ones((2, steps, 3), layer.compute_dtype)
    result = tf.function(lambda x: gradients(layer, x, tf.ones_like(x), {}))(x)
    # The first step has no state before it.
    expected = {"kernel": 2 * steps, "recurrent_kernel": 2 * (steps - 1), "bias": 2 * steps}
    for name, sum_of_ones in expected.items():
        (actual,) = (value for path, value in result.items() if path.rpartition("/")[2] == name)
        # One rounding to bfloat16; that of the bias is a float32 sum.
        assert_close(actual, np.full(actual.shape, float(sum_of_ones)), 1e-6 if name == "bias" else 4e-3, name)


def long_gradients(make, name, policy):
    x, weights = rounded(np.random.default_rng(0).normal(0.3, 1.0, (4, 1500, 4))), remembering(name, 8)
    upstream = rounded(np.random.default_rng(1).normal(size=(4, 8)))
    layer = make(8, dtype=policy)
    layer.build(x.shape)
    layer.set_weights(weights)
    given = tf.cast(x, layer.compute_dtype), tf.cast(upstream, layer.compute_dtype)
    return tf.function(lambda x, upstream: gradients(layer, x, upstream, {}))(*given)


def check_long_gradients(make, name, policy):
    """Stock Keras in float64, whose gradients TensorFlow derives from its loop."""
    expected = long_gradients(getattr(keras.layers, name), name, "float64")
    for path, value in long_gradients(make, name, policy).items():
        assert_close(value, expected[path], {"mixed_bfloat16": 2e-2, "mixed_float16": 3e-3, "float32": 2e-5}[policy])


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_gradients_over_a_long_sequence(name, policy):
    check_long_gradients(getattr(layers, name), name, policy)


@pytest.mark.stock_defect
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_stock_gradients_over_a_long_sequence(name, policy):
    check_long_gradients(getattr(keras.layers, name), name, policy)


def counting(make):
    """A cell state that 70,000 is added to, minus as much, with an output of what is left over 10,000."""
    layer = make(1, activation="linear", recurrent_activation="linear", dtype="mixed_float16", use_bias=False)
    layer.build((1, 3, 2))
    # i = x0, f = 1 (by x1), g = 35000 x1, o = x1 / 10000
    layer.set_weights([np.array([[1, 0, 0, 0], [0, 1, 35000, 1e-4]]), np.zeros((1, 4))])
    return layer(np.array([[[1, 1], [1, 1], [-1, 1]]], "float32"))


def test_a_cell_state_may_leave_the_range_of_float16():
    """35000 + 35000 - 35000: the answer is 3.5, by a kernel that float16 rounds by a part in 2,000."""
    np.testing.assert_allclose(counting(layers.LSTM), [[3.5]], rtol=2e-3)


@pytest.mark.stock_defect
def test_stock_cell_state_may_leave_the_range_of_float16():
    np.testing.assert_allclose(counting(keras.layers.LSTM), [[3.5]], rtol=2e-3)


@pytest.mark.parametrize("mask", [[[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], [[1, 0, 1, 0, 1]] * 3])
@pytest.mark.parametrize("arguments", [{}, {"zero_output_for_mask": True}, {"go_backwards": True}, {"unroll": True}])
@pytest.mark.parametrize("name", NAMES)
def test_masks_and_initial_states(name, arguments, mask):
    """As in Keras: outputs, states and gradients, also before the first step that counts and of a row without any."""
    x = np.random.normal(size=(3, 5, 2)).astype("float32")
    states = [tf.constant(np.random.normal(size=(3, 4)), "float32") for _ in range(2 if name == "LSTM" else 1)]
    results = []
    for of in (keras.layers, layers):
        layer = getattr(of, name)(4, return_sequences=True, return_state=True, **arguments)
        layer.build(x.shape)
        if results:
            layer.set_weights(weights)  # noqa: F821  (of the first round)
        weights = layer.get_weights()
        last = getattr(of, name)(4, **arguments)
        last.build(x.shape)
        last.set_weights(weights)
        call = {"mask": tf.constant(np.array(mask, "bool")), "initial_state": states}
        with tf.GradientTape() as tape:
            tape.watch(states)
            answers = [*layer(x, **call), last(x, **call)]
            loss = sum(tf.reduce_sum(tf.sin(answer + index)) for index, answer in enumerate(answers))
        variables = [weight.value for weight in [*layer.trainable_weights, *last.trainable_weights]]
        results.append([*answers, *tape.gradient(loss, [*states, *variables])])
    for ours, stock in zip(results[1], results[0], strict=True):
        assert_close(ours, stock, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_states_are_float32_and_a_sequence_in_two_parts_is_the_whole(name):
    layer = getattr(layers, name)(4, return_sequences=True, return_state=True, dtype="mixed_bfloat16")
    x = np.random.normal(size=(2, 10, 3)).astype("float32")
    whole, *states = layer(x)
    first, *between = layer(x[:, :6])
    second, *last = layer(x[:, 6:], initial_state=between)
    assert {state.dtype for state in states} == {tf.float32}
    np.testing.assert_array_equal(tf.concat([first, second], 1), whole)
    for ours, reference in zip(last, states, strict=True):
        np.testing.assert_array_equal(ours, reference)
    # Symbolic tensors say so, too, also those of cells in a stack.
    symbolic = layer(keras.Input((10, 3)))
    assert [each.dtype for each in symbolic] == ["bfloat16"] + ["float32"] * len(states)
    cells = [
        keras.layers.LSTMCell(2, dtype="mixed_bfloat16"),
        getattr(layers, f"{name}Cell")(3, dtype="mixed_bfloat16"),
    ]
    stacked = layers.RNN(cells, return_state=True, dtype="mixed_bfloat16")
    _, *symbolic = stacked(keras.Input((10, 3)))
    _, *states = stacked(x)
    for each, state in zip(keras.tree.flatten(symbolic), keras.tree.flatten(states), strict=True):
        assert (each.dtype, each.shape[1:]) == (state.dtype.name, state.shape[1:])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", [*NAMES, "RNN"])
def test_a_stateful_layer_goes_on_where_it_was(name, compiled):
    def make(**arguments):
        if name == "RNN":
            return layers.RNN(layers.GRUCell(4, dtype="mixed_bfloat16"), dtype="mixed_bfloat16", **arguments)
        return getattr(layers, name)(4, dtype="mixed_bfloat16", **arguments)

    x = np.random.normal(size=(2, 8, 3)).astype("float32")
    whole, stateful = make(return_state=True), make(stateful=True)
    whole.build(x.shape)
    stateful.build((2, 4, 3))
    stateful.set_weights(whole.get_weights())
    assert {state.dtype for state in stateful.states} == {"float32"}
    call = tf.function(stateful) if compiled else stateful
    expected, *states = whole(x)
    for _ in range(2):
        first = call(x[:, :4])
        np.testing.assert_array_equal(call(x[:, 4:]), expected)
        for kept, state in zip(stateful.states, states, strict=True):  # to the last digit of float32
            np.testing.assert_array_equal(kept, state)
        stateful.reset_state()
    np.testing.assert_array_equal(call(x[:, :4]), first)
    with pytest.raises(ValueError, match=r"Expected batch size: 2\n- Received batch size: 3"):
        stateful(np.zeros((3, 4, 3), "float32"))


@pytest.mark.parametrize("merge_mode", ["concat", "sum", None])
@pytest.mark.parametrize("name", NAMES)
def test_bidirectional(name, merge_mode, tmp_path):
    x = np.random.normal(size=(2, 6, 3)).astype("float32")
    wrapped = [
        keras.layers.Bidirectional(
            getattr(of, name)(4, return_sequences=True, dtype=dtype), merge_mode=merge_mode, dtype=dtype
        )
        for of, dtype in ((keras.layers, "float32"), (layers, "mixed_bfloat16"))
    ]
    for each in wrapped:
        each.build(x.shape)
    wrapped[1].set_weights(wrapped[0].get_weights())
    assert type(wrapped[1].backward_layer) is getattr(layers, name)
    outputs = [keras.tree.flatten(each(x)) for each in wrapped]
    for stock, ours in zip(*outputs, strict=True):
        assert ours.dtype == tf.bfloat16
        assert_close(ours, stock, 3.2e-2)
    inputs = keras.Input((6, 3))
    keras.Model(inputs, wrapped[1](inputs)).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.tree.flatten(loaded(x))[0], outputs[1][0])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, {key: 0.5}) for name in NAMES for key in ("dropout", "recurrent_dropout")),
        # SimpleRNN has one gate, and so one implementation.
        *((name, {"dropout": 0.5, "implementation": 1, "use_cudnn": False}) for name in ("LSTM", "GRU")),
    ],
)
def test_dropout_is_that_of_keras_for_the_same_seed(name, arguments):
    x = np.random.normal(size=(3, 6, 4)).astype("float32")
    stock, ours = (getattr(of, name)(5, seed=7, **arguments) for of in (keras.layers, layers))
    for each in (stock, ours):
        each.build(x.shape)
    ours.set_weights(stock.get_weights())
    upstream = tf.constant(np.random.normal(size=(3, 5)), "float32")
    expected, actual = (gradients(each, tf.constant(x), upstream, {"training": True}) for each in (stock, ours))
    for path, value in actual.items():
        assert_close(value, expected[path], 1e-5, path)
    assert not np.allclose(actual["y"], ours(x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_see_the_whole_formula(name, compiled):
    """What the forward pass keeps for the gradient depends on the input, too."""
    layer = getattr(layers, name)(2, dtype="float64")
    layer.build((1, 3, 2))
    upstream = np.random.normal(size=(1, 2))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x) * upstream)
        return tape.gradient(loss, x)

    x = np.random.normal(size=(1, 3, 2))
    call = tf.function(gradient) if compiled else gradient
    (theoretical,), (numerical,) = tf.test.compute_gradient(call, [x], delta=1e-4)
    assert_close(theoretical, numerical, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_sequences_of_any_length_and_batch(name):
    layer, stock = (getattr(of, name)(4, return_sequences=True) for of in (layers, keras.layers))
    layer.build((None, None, 3))
    stock.build((None, None, 3))
    stock.set_weights(layer.get_weights())
    step = tf.function(
        lambda x: gradients(layer, x, tf.ones((tf.shape(x)[0], tf.shape(x)[1], 4)), {}),
        input_signature=[tf.TensorSpec((None, None, 3))],
    )
    for batch, steps in ((2, 5), (3, 9), (1, 1)):
        x = tf.constant(np.random.normal(size=(batch, steps, 3)), "float32")
        expected = gradients(stock, x, tf.ones((batch, steps, 4)), {})
        for path, value in step(x).items():
            assert_close(value, expected[path], 1e-5, path)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_learns_as_stock_float32_does(jit_compile):
    """The sign of the sum of 40 small numbers, by `fit`, with masks."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.1, (64, 40, 1)).astype("float32")
    y = (x.sum((1, 2)) > 0).astype("float32")
    histories = []
    for of, dtype in ((keras.layers, "float32"), (layers, "mixed_bfloat16")):
        keras.utils.set_random_seed(0)
        gru, lstm = of.GRU(8, return_sequences=True, dtype=dtype), of.LSTM(8, dtype=dtype)
        model = keras.Sequential([keras.layers.Masking(), gru, lstm, keras.layers.Dense(1)])
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=jit_compile)
        histories.append(model.fit(x, y, batch_size=64, epochs=24, verbose=0).history["loss"])
    assert histories[0][-1] < histories[0][0] - 0.15
    # Seen: 0.008. Stock mixed_bfloat16 ends 0.012 away.
    np.testing.assert_allclose(histories[1], histories[0], rtol=0, atol=0.02)


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}Cell" for name in NAMES)])
def test_refuses_what_keras_refuses_in_its_words(name):
    errors = []
    for of in (keras.layers, layers):
        with pytest.raises(ValueError, match="expected a positive integer, got 0") as caught:
            getattr(of, name)(0)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("arguments", "shape", "text"),
    [
        ({"unroll": True}, (2, None, 3), "Cannot unroll a RNN if the time dimension is undefined"),
        ({"stateful": True}, (None, 5, 3), "batch size must be static"),
        ({}, (2, 3), "expected ndim=3"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_refuses_shapes_in_the_words_of_keras(name, arguments, shape, text):
    for of in (keras.layers, layers):
        layer = getattr(of, name)(4, **arguments)
        with pytest.raises(ValueError, match=text):
            tf.function(layer).get_concrete_function(tf.TensorSpec(shape))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_cudnn_that_is_not_there(name, policy):
    x = np.zeros((2, 3, 4), "float32")
    with pytest.raises(ValueError, match="use_cudnn=True was specified, but cuDNN is not supported"):
        getattr(layers, name)(4, use_cudnn=True, dtype=policy)(x)
    with pytest.raises(ValueError, match=r"Expected one of .*Received: use_cudnn=maybe"):
        getattr(layers, name)(4, use_cudnn="maybe")
    assert getattr(layers, name)(4, use_cudnn=False, dtype=policy)(x).shape == (2, 4)


@pytest.mark.parametrize("of", ["layers", "cells"])
def test_what_is_no_cell(of):
    make = layers.RNN if of == "layers" else lambda cell: layers.StackedRNNCells([cell])
    with pytest.raises(ValueError, match="call"):
        make(object())


@pytest.mark.parametrize("arguments", [{}, {"unroll": True}, {"return_sequences": True}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_export(name, arguments, tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), getattr(layers, name)(3, dtype="mixed_bfloat16", **arguments)])
    path = keras_mp.export(model, tmp_path / name, precision="mixed", verify=False)
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    ((given, _),) = serve.structured_input_signature[1].items()
    x = tf.random.normal((3, 6, 4))
    (found,) = serve(**{given: x}).values()
    np.testing.assert_allclose(found, tf.cast(model(x), "float32"), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_jacobian_in_eager_code(name):
    stock, ours = (getattr(of, name)(3) for of in (keras.layers, layers))
    for each in (stock, ours):
        each.build((2, 5, 4))
    ours.set_weights(stock.get_weights())
    x = tf.constant(np.random.normal(size=(2, 5, 4)), "float32")
    results = []
    for each in (stock, ours):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = each(x)
        results.append(tape.jacobian(y, x))
    assert_close(results[1], results[0], 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_masks_with_an_axis_for_the_features(name):
    layer, x = getattr(layers, name)(3), np.random.normal(size=(2, 5, 4)).astype("float32")
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    np.testing.assert_array_equal(layer(x, mask=mask[..., None]), layer(x, mask=mask))
    for wrong in (mask[:, :4], mask[:1], mask[0]):
        with pytest.raises(ValueError, match=r"The `mask` must be of shape \(batch_size, steps\), here \(2, 5\)"):
            layer(x, mask=wrong)
