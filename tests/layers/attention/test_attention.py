"""Attention: the contract, masks, dropout, bad input, saved weights, range, and what stock Keras gets wrong."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp import layers
from keras_mp.errors import ArgumentError
from keras_mp.ops.attention import blocks
from tests.contract.layer_contract import Case, assert_close, contract, gradients_of

SHAPES = [(4, 6, 8), (4, 5, 8)]
LISTED = [(4, 6, 8), (4, 5, 8), (4, 5, 8)]
PAIRS = np.random.default_rng(1).random((4, 6, 5)) > 0.4


# 16 bits round the projections, the scores, the probabilities and the output, and the gradients on their way back.
ROUNDED = {"float16": 1e-2, "bfloat16": 6e-2}


def multi_head(family, **arguments):
    return lambda: family.MultiHeadAttention(2, 3, **arguments)


def grouped(family, **arguments):
    make = layers.GroupedQueryAttention if family is layers else keras.layers.GroupQueryAttention
    return lambda: make(3, 4, 2, **arguments)


def pair(make, shapes, call=None, ours=None, masked=True, **arguments):
    """A case of our layer, with further arguments of its own, and the stock layer."""
    return Case(
        make(layers, **arguments, **(ours or {})),
        make(keras.layers, **arguments),
        shapes,
        call or {},
        # So small that the softmax is not yet a maximum.
        masked=masked,
        scale=0.3,
        weights=(-1.0, 1.0),
        vanishing=("key/bias",),  # what it adds to a query's scores is the same for all keys
        tolerance=ROUNDED,
    )


def listed(name, shapes, call=None, **arguments):
    """A case of one of the two layers that are called on a list."""
    return Case(
        lambda: getattr(layers, name)(**arguments),
        lambda: getattr(keras.layers, name)(**arguments),
        shapes,
        call or {},
        as_list=True,
        scale=0.3,
        tolerance=ROUNDED,
    )


# The stock layer passes masks of steps to a softmax they do not fit, over several axes, and to projections that warn of
# them, with grouped queries: `masked=False`.
CASES = {
    "MultiHeadAttention": pair(multi_head, SHAPES),
    "MultiHeadAttention, causal": pair(multi_head, [(4, 6, 8), (4, 6, 8)], {"use_causal_mask": True}),
    "MultiHeadAttention, blocks": pair(multi_head, SHAPES, {"use_causal_mask": True}, {"flash_attention": True}),
    "MultiHeadAttention, pairs": pair(multi_head, SHAPES, {"attention_mask": PAIRS}, value_dim=5, output_shape=7),
    "MultiHeadAttention, key": pair(multi_head, [(4, 6, 8), (4, 5, 7), (4, 5, 9)], use_bias=False),
    "MultiHeadAttention, images": pair(multi_head, [(4, 2, 3, 8), (4, 2, 3, 8)], masked=False),
    "MultiHeadAttention, one axis of images": pair(
        multi_head, [(4, 2, 3, 8), (4, 2, 3, 8)], masked=False, attention_axes=(2,)
    ),
    "GroupedQueryAttention": pair(grouped, SHAPES, masked=False),
    "GroupedQueryAttention, blocks": pair(
        grouped, SHAPES, {"attention_mask": PAIRS}, {"flash_attention": True}, masked=False
    ),
    "Attention": listed("Attention", LISTED),
    "Attention, causal": listed("Attention", LISTED[:2], {"use_causal_mask": True}, use_scale=True),
    "Attention, concat": listed("Attention", LISTED, use_scale=True, score_mode="concat"),
    "AdditiveAttention": listed("AdditiveAttention", LISTED),
    "AdditiveAttention, causal": listed("AdditiveAttention", LISTED[:2], {"use_causal_mask": True}, use_scale=False),
}


@contract(CASES)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


# --- against stock ---------------------------------------------------------------------------------------------------

# Keras 3.12 has neither windows nor gates.
KNOWN = inspect.signature(keras.layers.MultiHeadAttention.__init__).parameters
OPTIONS = [{}, *({name: value} for name, value in {"sliding_window": 3, "use_gate": True}.items() if name in KNOWN)]
KINDS = {"MultiHeadAttention": multi_head, "GroupedQueryAttention": grouped}
LISTS = ("Attention", "AdditiveAttention")
HEADS = {"MultiHeadAttention": 2, "GroupedQueryAttention": 4}


def steps(*lengths, size):
    return np.arange(size) < np.array(lengths)[:, None]


def calls(kind):
    """Arguments of a call with 4 queries of 6 steps and values of 5; some hide all keys from a query."""
    by_head = np.random.default_rng(2).random((4, HEADS[kind], 6, 5)) > 0.4
    hides = {"query_mask": steps(6, 5, 4, 0, size=6), "value_mask": steps(5, 4, 0, 3, size=5)}
    return [
        {},
        {"use_causal_mask": True},
        {"attention_mask": PAIRS},
        {"attention_mask": np.broadcast_to(PAIRS, (4, 6, 5)).astype("float32"), "use_causal_mask": True},
        {"attention_mask": by_head},
        {"attention_mask": by_head[:, :1, :1]},
        {**hides, "key_mask": steps(4, 5, 5, 5, size=5)},
        {**hides, "attention_mask": PAIRS[:1], "use_causal_mask": True},
    ]


def twins(ours, stock, shapes):
    """Our layer and the stock one with the same random weights."""
    made = []
    for make in (ours, stock):
        layer = make()
        layer.build(*shapes)
        made.append(layer)
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.5, weight.shape) for weight in made[0].trainable_weights]
    for layer in made:
        for weight, value in zip(layer.trainable_weights, weights, strict=True):
            weight.assign(value)
    return made


def numbers(*shapes):
    rng = np.random.default_rng(3)
    return [tf.constant(rng.normal(size=shape), "float32") for shape in shapes]


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_function_as_stock_in_float32(kind, options, flash_attention, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    make = KINDS[kind]
    ours = make(layers, **options, flash_attention=flash_attention)
    layer, stock = twins(ours, make(keras.layers, **options), SHAPES)
    assert [weight.path.partition("/")[2] for weight in layer.weights] == [
        weight.path.partition("/")[2] for weight in stock.weights
    ]
    inputs, upstream = numbers(*SHAPES), numbers((4, 6, 8))[0]
    for call in calls(kind):
        case = Case(None, None, SHAPES, call)
        expected, actual = (gradients_of(case, each, inputs, upstream) for each in (stock, layer))
        assert actual.keys() == expected.keys()
        largest = max(np.abs(x).max() for x in expected.values())
        for name, value in actual.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5 * largest, err_msg=f"{call} {name}")


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_stock_in_float32(kind, options, policy):
    make = KINDS[kind]
    layer, stock = twins(make(layers, **options, dtype=policy), make(keras.layers, **options, dtype="float32"), SHAPES)
    inputs = [0.3 * x for x in numbers(*SHAPES)]
    for call in calls(kind):
        expected, expected_scores = stock(*inputs, return_attention_scores=True, **call)
        actual, scores = layer(*inputs, return_attention_scores=True, **call)
        assert scores.shape == (4, HEADS[kind], 6, 5)
        assert scores.dtype == layer.compute_dtype
        tolerance = {"float32": 1e-5, **ROUNDED}[layer.compute_dtype]
        assert_close(scores, expected_scores, tolerance, f"scores {call}")
        assert_close(actual, expected, tolerance, f"{call}")


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", LISTS)
def test_scores_of_lists_are_those_of_stock_in_float32(name, policy):
    layer, stock = (
        getattr(family, name)(dtype=dtype) for family, dtype in ((layers, policy), (keras.layers, "float32"))
    )
    inputs = [0.3 * x for x in numbers(*SHAPES)]
    for value_mask in (None, steps(5, 4, 0, 3, size=5)):
        for dtype in ("bool", "int32", "float32"):
            mask = None if value_mask is None else [steps(6, 5, 4, 0, size=6), value_mask.astype(dtype)]
            for causal in (False, True):
                if causal and dtype != "bool":
                    continue  # which the stock layer refuses
                stock(inputs)
                layer(inputs)
                layer.set_weights(stock.get_weights())
                call = {"mask": mask, "return_attention_scores": True, "use_causal_mask": causal}
                (y, scores), (expected, expected_scores) = (each(inputs, **call) for each in (layer, stock))
                assert scores.shape == (4, 6, 5)
                assert scores.dtype == y.dtype == layer.compute_dtype
                tolerance = {"float32": 1e-5, **ROUNDED}[layer.compute_dtype]
                assert_close(scores, expected_scores, tolerance)
                assert_close(y, expected, tolerance)


# The stock layer's projections warn of the masks of grouped queries.
@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask")
@pytest.mark.parametrize("options", [*OPTIONS, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_tensors_carry(kind, options):
    """From an embedding and from a masking layer, as far as the layer after this one."""
    make = KINDS[kind]
    words = np.array([[4, 2, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    pictures = np.random.default_rng(0).normal(size=(3, 6, 8)) * steps(6, 4, 5, size=6)[..., None]
    answers = []
    for family in (keras.layers, layers):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6, 8)), keras.Input((5,), dtype="int32")
        query, value = keras.layers.Masking()(inputs[0]), keras.layers.Embedding(5, 8, mask_zero=True)(inputs[1])
        outputs = make(family, **options)()(query, value, use_causal_mask=True)
        model = keras.Model(inputs, [outputs, keras.layers.GlobalAveragePooling1D()(outputs)])
        answers.append(model([pictures, words]))
    for actual, expected in zip(answers[1], answers[0], strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("axes", [(1, 2), (2,), -2], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_attention_over_axes_of_images(axes, dropout):
    shapes = [(2, 3, 4, 8), (2, 3, 4, 8)]
    arguments = {"attention_axes": axes, "dropout": dropout}
    layer, stock = twins(multi_head(layers, **arguments), multi_head(keras.layers, **arguments), shapes)
    inputs, upstream = numbers(*shapes), numbers((2, 3, 4, 8))[0]
    mask = {(1, 2): (2, 3, 4, 3, 4)}.get(axes, (2, 3, 4, 4))
    for call in ({}, {"attention_mask": np.random.default_rng(0).random(mask) > 0.4}):
        case = Case(None, None, shapes, call)
        expected, actual = (gradients_of(case, each, inputs, upstream) for each in (stock, layer))
        largest = max(np.abs(x).max() for x in expected.values())
        for name, value in actual.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-5 * largest, err_msg=name)
        scores = [each(*inputs, return_attention_scores=True, **call)[1] for each in (layer, stock)]
        assert_close(*scores, 1e-5)


# --- dropout, configuration and weights ------------------------------------------------------------------------------


def dropping(name, family=layers, **arguments):
    """A layer that drops half of the probabilities, and how to call it."""
    inputs = numbers(*SHAPES)
    if name in KINDS:
        layer = KINDS[name](family, dropout=0.5, seed=7, **arguments)()
        return layer, lambda **call: layer(*inputs, **call)
    layer = getattr(family, name)(dropout=0.5, seed=7, **arguments)
    return layer, lambda **call: layer(inputs, **call)


@pytest.mark.parametrize("name", [*KINDS, *LISTS])
def test_dropout_is_for_training_and_repeats_with_the_seed(name):
    runs = []
    for arguments in ({}, {"dtype": "mixed_bfloat16"}) + (({"flash_attention": True},) if name in KINDS else ()):
        for _ in range(2):
            keras.utils.set_random_seed(1)
            layer, run = dropping(name, **arguments)
            config = layer.get_config()
            if "seed" in dropping(name, keras.layers)[0].get_config():  # in Keras 3.12 not of all layers
                assert type(layer).from_config(config).seed == config["seed"] == 7
            quiet = run(training=False)
            np.testing.assert_array_equal(run(), quiet)
            runs.append([run(training=True) for _ in range(2)])
            assert np.abs(runs[-1][0] - quiet).max() > 0.01
            assert np.abs(runs[-1][0] - runs[-1][1]).max() > 0.01  # every step drops others
        for first, second in zip(*runs[-2:], strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", [*KINDS, *LISTS])
def test_scores_with_dropout_are_those_that_stock_answers(name):
    """Of the layers of several heads as they were before dropout, of the others as they are after it."""
    results = []
    for family in (layers, keras.layers):
        keras.utils.set_random_seed(1)
        _, run = dropping(name, family)
        quiet, scores = (run(training=training, return_attention_scores=True)[1] for training in (False, True))
        results.append((quiet, np.asarray(scores)))
    (quiet, ours), (expected, stock) = results
    assert_close(quiet, expected, 1e-5)
    assert (stock == 0).any() == (name in LISTS)
    assert (ours == 0).any() == (name in LISTS)
    factors = ours / np.asarray(quiet)
    np.testing.assert_allclose(factors[ours > 0], 2.0 if name in LISTS else 1.0, rtol=1e-4)


@pytest.mark.parametrize("flash_attention", [None, False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flash_attention_is_kept(kind, flash_attention, tmp_path):
    make = KINDS[kind]
    layer = make(layers, flash_attention=flash_attention, dropout=0.1)()
    assert layer.get_config()["flash_attention"] is flash_attention
    x = keras.Input((6, 8))
    model = keras.Model(x, layer(x, x))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").layers[-1]
    assert loaded.flash_attention is flash_attention
    assert type(layer).from_config(make(keras.layers)().get_config()).flash_attention is None


@pytest.mark.parametrize("name", [*KINDS, *LISTS])
def test_weights_go_to_stock_and_back(name, tmp_path):
    shapes = [shape[1:] for shape in SHAPES]

    def model(family):
        inputs = [keras.Input(shape) for shape in shapes]
        if name in KINDS:
            return keras.Model(inputs, KINDS[name](family)()(*inputs))
        return keras.Model(inputs, getattr(family, name)(use_scale=True)(inputs))

    inputs = numbers(*SHAPES)
    for source, target in ((layers, keras.layers), (keras.layers, layers)):
        source, target = model(source), model(target)
        source.set_weights([np.random.default_rng(1).normal(size=w.shape) for w in source.get_weights()])
        source.save_weights(tmp_path / "a.weights.h5")
        target.load_weights(tmp_path / "a.weights.h5")
        assert_close(target(inputs), source(inputs), 1e-5)
        target.set_weights([0 * weight for weight in target.get_weights()])
        target.set_weights(source.get_weights())
        assert_close(target(inputs), source(inputs), 1e-5)


# --- range -----------------------------------------------------------------------------------------------------------


def of_neighbours(layer):
    """What a query that tells 300 from 301 makes of two values."""
    value = np.array([[[0.0], [1.0]]], "float32")
    if isinstance(layer, keras.layers.AdditiveAttention):  # is a kind of `Attention`
        return layer([np.array([[[-300.0]]], "float32"), value, np.array([[[300.0], [301.0]]], "float32")])
    return layer([np.array([[[1.0]]], "float32"), value, np.array([[[300.0], [301.0]]], "float32")])


def neighbours(family, name):
    arguments = {"use_scale": False} if name == "AdditiveAttention" else {}
    difference = np.tanh(1) if name == "AdditiveAttention" else 1
    y = of_neighbours(getattr(family, name)(dtype="mixed_bfloat16", **arguments))
    assert y.dtype == "bfloat16"
    assert_close(y, [[[1 / (1 + np.exp(-difference))]]], 4e-3)


@pytest.mark.parametrize("name", LISTS)
def test_float32_inputs_are_not_cast_down_first(name):
    neighbours(layers, name)


@pytest.mark.stock_defect
@pytest.mark.parametrize("name", LISTS)
def test_stock_does_not_cast_float32_inputs_down_first(name):
    neighbours(keras.layers, name)


def masked_altogether(family, score_mode):
    """The mean of all values, as in float32, where no key is to be seen and all scores are negative."""
    layer = family.Attention(dtype="mixed_float16", score_mode=score_mode)
    query, value = np.full((1, 2, 64), -4, "float16"), np.full((1, 3, 64), 4, "float16")
    with tf.GradientTape() as tape:
        x = tf.constant(value)
        tape.watch(x)
        y = layer([query, x], mask=[None, np.zeros((1, 3), bool)])
    np.testing.assert_allclose(y, np.full((1, 2, 64), 4.0), rtol=1e-3)
    np.testing.assert_allclose(tape.gradient(y, x), np.full((1, 3, 64), 2 / 3), rtol=1e-2)


@pytest.mark.parametrize("score_mode", ["dot", "concat"])
def test_attention_where_all_is_masked(score_mode):
    masked_altogether(layers, score_mode)


@pytest.mark.stock_defect
def test_stock_attention_where_all_is_masked():
    masked_altogether(keras.layers, "dot")  # NaN: the scores less 65504 are -inf


def large(family, kind, **arguments):
    """Queries and keys of +-60000 in float16, of which each sees itself; the values and gradients are as float64's."""
    x = tf.constant([[[60000.0, 60000.0], [60000.0, -60000.0]]], "float16")
    with tf.GradientTape() as tape:
        tape.watch(x)
        if kind == "Attention":
            y = family.Attention(dtype="mixed_float16", **arguments)([x, x])
        else:
            layer = family.MultiHeadAttention(1, 2, dtype="mixed_float16", use_bias=False, **arguments)
            layer.build(x.shape, x.shape)
            layer.set_weights([np.eye(2).reshape(weight.shape) for weight in layer.get_weights()])
            y = layer(x, x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(tape.gradient(y, x), np.ones(x.shape))


LARGE = [
    ("Attention", {}),
    ("Attention", {"use_scale": True}),
    ("MultiHeadAttention", {}),
    ("MultiHeadAttention", {"dropout": 0.1}),
]


@pytest.mark.parametrize(("kind", "arguments"), [*LARGE, ("MultiHeadAttention", {"flash_attention": True})], ids=str)
def test_large_queries_and_keys(kind, arguments, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1)
    large(layers, kind, **arguments)


@pytest.mark.stock_defect
@pytest.mark.parametrize(("kind", "arguments"), LARGE, ids=str)
def test_stock_large_queries_and_keys(kind, arguments):
    large(keras.layers, kind, **arguments)  # NaN


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("Attention", {}, (2, 5, 4)),
        ("Attention", {"score_mode": "concat"}, (2, 5, 4)),
        ("AdditiveAttention", {}, (2, 5, 4)),
        ("AdditiveAttention", {}, (2, 3, 5, 4)),
        # Keras 3.12 takes no more axes.
        *([("Attention", {}, (2, 3, 5, 4))] if "use_gate" in KNOWN else []),
    ],
    ids=str,
)
def test_range_of_the_layers_called_on_lists(name, arguments, shape):
    """Large values and gradients, and large queries and keys, in float16: what float64 makes of the same numbers."""
    rng = np.random.default_rng(0)
    for sizes in ((6e4, 1.0, 6e4, 1.0), (1.0, 6e4, 1.0, 1.0), (1.0, 1.0, 1.0, 2e4)):
        inputs = [tf.cast(size * rng.uniform(-1, 1, shape), "float16") for size in sizes]
        *inputs, upstream = inputs
        results = []
        for family, dtype in ((layers, "float16"), (keras.layers, "float64")):
            layer = getattr(family, name)(dtype="float64" if dtype == "float64" else "mixed_float16", **arguments)
            layer.build([shape] * 3)
            layer.set_weights(
                [np.linspace(0.5, 1, weight.size).reshape(weight.shape) for weight in layer.get_weights()]
            )
            given = [tf.cast(x, dtype) for x in inputs]
            with tf.GradientTape() as tape:
                tape.watch(given)
                y = layer(given)
            results.append([y, *tape.gradient(y, given, tf.cast(upstream, dtype))])
        for value, expected in zip(*results, strict=True):
            largest = np.abs(expected).max()
            assert largest < 65504
            assert np.isfinite(value).all(), sizes
            if largest > 1e-3:
                assert_close(value, expected, 2e-2, f"{sizes}")


# --- training --------------------------------------------------------------------------------------------------------


# The stock model has Keras's own wrapper, of which we warn.
@pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning")
@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [
        ("mixed_float16", False),
        ("mixed_bfloat16", True),
        pytest.param("mixed_float16", True, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_texts_of_any_length_train(policy, jit_compile):
    keras.config.set_dtype_policy(policy)
    words = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(9, 8, mask_zero=True)(words)
    x = x + layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x, use_causal_mask=True)
    x = keras.layers.Dense(1, dtype="float32")(keras.layers.GlobalAveragePooling1D()(x))
    model = keras.Model(words, x)
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit_compile)
    before = [weight.numpy() for weight in model.trainable_weights]
    losses = []
    for length in (5, 5, 5) if jit_compile else (7, 5, 5, 7):  # XLA compiles anew for each
        texts = np.random.default_rng(length).integers(1, 9, (8, length))
        losses.append(model.train_on_batch(texts, np.ones((8, 1))))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.isfinite(weight).all()
        assert (weight.numpy() != old).any() or weight.path.endswith("key/bias"), weight.path


def test_8192_steps_train():
    """The scores of all pairs would be 134 million numbers."""
    layer = layers.MultiHeadAttention(1, 8, dtype="mixed_bfloat16")
    x = tf.cast(np.random.default_rng(0).normal(size=(1, 8192, 8)), "bfloat16")
    layer.build(x.shape, x.shape)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(x, x, use_causal_mask=True, training=True)
            loss = tf.reduce_sum(tf.square(tf.cast(y, "float32")))
        return y, tape.gradient(loss, layer.trainable_variables)

    y, gradients = step(x)
    assert all(np.isfinite(gradient).all() and np.any(gradient) for gradient in gradients[:2] + gradients[4:])
    # The first steps see nothing of the others.
    stock = keras.layers.MultiHeadAttention(1, 8, dtype="float32")
    stock.build(x.shape, x.shape)
    stock.set_weights(layer.get_weights())
    first = tf.cast(x[:, :64], "float32")
    assert_close(y[:, :64], stock(first, first, use_causal_mask=True), ROUNDED["bfloat16"])


# --- bad input -------------------------------------------------------------------------------------------------------


def symbolic(*shape, dtype="float32"):
    return keras.Input(shape, dtype=dtype)


def bad_masks(kind):
    """Masks that do not fit 6 queries and 5 values, each symbolic, and a word of the message."""
    heads = HEADS[kind]
    return [
        ({"attention_mask": symbolic(6, 6, dtype="bool")}, r"\(None, 6, 6\)"),
        ({"attention_mask": symbolic(5, 5, dtype="bool")}, r"\(None, 5, 5\)"),
        ({"attention_mask": symbolic(heads + 1, 6, 5, dtype="bool")}, rf"\(None, {heads + 1}, 6, 5\)"),
        ({"attention_mask": symbolic(1, heads, 6, 5, dtype="bool")}, "attention_mask"),
        ({"attention_mask": np.ones(5, bool)}, r"\(5,\)"),
        ({"query_mask": symbolic(5, dtype="bool")}, "query_mask"),
        ({"value_mask": symbolic(6, dtype="bool")}, "value_mask"),
        ({"key_mask": symbolic(4, dtype="bool")}, "key_mask"),
        ({"key_mask": symbolic(1, 5, dtype="bool")}, "key_mask"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_do_not_fit_are_refused_before_anything_is_computed(kind):
    for arguments, message in bad_masks(kind):
        for flash_attention in (False, True):
            layer = KINDS[kind](layers, flash_attention=flash_attention)()
            with pytest.raises(ValueError, match=message):
                layer(symbolic(6, 8), symbolic(5, 8), **arguments)
            given = {
                name: mask if isinstance(mask, np.ndarray) else np.ones((2, *mask.shape[1:]), bool)
                for name, mask in arguments.items()
            }
            with pytest.raises(ValueError, match=message.replace("None", "2")):
                layer(np.ones((2, 6, 8), "float32"), np.ones((2, 5, 8), "float32"), **given)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_words_are_refused(kind):
    layer = KINDS[kind](layers)()
    for name, shape in {"attention_mask": (6, 5), "query_mask": (6,), "value_mask": (5,), "key_mask": (5,)}.items():
        with pytest.raises((TypeError, ValueError), match=f"{name}.*string"):
            layer(symbolic(6, 8), symbolic(5, 8), **{name: symbolic(*shape, dtype="string")})


@pytest.mark.parametrize("name", LISTS)
def test_lists_and_masks_that_do_not_fit_are_refused_before_anything_is_computed(name):
    layer = getattr(layers, name)()
    query, value = symbolic(6, 8), symbolic(5, 8)
    with pytest.raises(ValueError, match=f"{name} layer must be called on a list of inputs"):
        layer(query)
    with pytest.raises(ValueError, match=f"{name} layer accepts inputs list of length 2 or 3.*length: 1"):
        layer([query])
    with pytest.raises(ValueError, match=f"{name} layer mask must be a list"):
        layer([query, value], mask=symbolic(6, dtype="bool"))
    with pytest.raises(ValueError, match=f"{name} layer accepts mask list of length 2 or 3"):
        layer([query, value], mask=[None])
    for mask in (
        [None, symbolic(6, dtype="bool")],
        [symbolic(5, dtype="bool"), None],
        [None, symbolic(1, 6, 5, dtype="bool")],
        [None, symbolic(5, dtype="string")],
    ):
        with pytest.raises((TypeError, ValueError), match="mask"):
            layer([query, value], mask=mask)
    with pytest.raises(ValueError, match="mask"):
        layer([np.ones((2, 6, 8)), np.ones((2, 5, 8))], mask=[None, np.ones((2, 6), bool)])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_refused_in_blocks(kind):
    layer = KINDS[kind](layers, flash_attention=True)()
    message = "Returning attention scores is not supported when flash attention is enabled"
    x = np.ones((2, 6, 8), "float32")
    with pytest.raises(ValueError, match=message):
        layer(x, x, return_attention_scores=True)
    with pytest.raises(ValueError, match=message):
        layer(symbolic(6, 8), symbolic(6, 8), return_attention_scores=True)


def test_arguments_are_refused_in_the_words_of_keras():
    with pytest.raises(ValueError, match="`num_query_heads` must be divisible by `num_key_value_heads`"):
        layers.GroupedQueryAttention(4, 3, 2)
    with pytest.raises(ValueError, match=r"last dimension of `query_shape` and `value_shape` must be equal.* 8, 7"):
        layers.GroupedQueryAttention(4, 4, 2)(symbolic(6, 8), symbolic(5, 7))
    for layer in (layers.GroupedQueryAttention(4, 4, 2), layers.MultiHeadAttention(2, 4)):
        with pytest.raises(ValueError, match="All dimensions of `value` and `key`, except the last one, must be equal"):
            layer(symbolic(6, 8), symbolic(5, 8), symbolic(4, 8))
    with pytest.raises(ValueError, match="score_mode"):
        layers.Attention(score_mode="product")
    if "use_gate" in KNOWN:  # these checks came with it
        for arguments in ((0, 4), (1.5, 4), (2, 0)):
            with pytest.raises(ValueError, match="expected a positive integer"):
                layers.MultiHeadAttention(*arguments)
    if "sliding_window" in KNOWN:
        for make in KINDS.values():
            with pytest.raises(ValueError, match="`sliding_window` must be `None` or a positive integer"):
                make(layers, sliding_window=0)()


def test_texts_of_no_steps():
    x = np.zeros((4, 0, 8), "float32")
    assert layers.GroupedQueryAttention(4, 4, 2)(x, x).shape == (4, 0, 8)
    assert layers.MultiHeadAttention(2, 4)(x, x).shape == (4, 0, 8)


def test_a_mask_that_is_a_list():
    layer, x = layers.MultiHeadAttention(2, 4), np.random.normal(size=(1, 3, 8)).astype("float32")
    mask = [[[True, False, True]] * 3]
    np.testing.assert_array_equal(layer(x, x, attention_mask=mask), layer(x, x, attention_mask=np.array(mask)))


def test_scores_after_dropout_are_those_of_the_outputs_in_a_training_step():
    """XLA draws other numbers for a seed than TensorFlow: both have to be dropped on the same side."""
    layer = layers.Attention(dropout=0.5, seed=1)
    query = tf.constant(np.random.normal(size=(2, 8, 8)), "float32")
    identity = tf.eye(8, batch_shape=[2])  # as values: the outputs are the probabilities that were used

    @tf.function
    def step(query):
        with tf.GradientTape() as tape:
            tape.watch(query)
            outputs, scores = layer([query, identity], training=True, return_attention_scores=True)
        return outputs, scores, tape.gradient(outputs, query)

    outputs, scores, _ = step(query)
    np.testing.assert_allclose(scores, outputs, atol=1e-6)


@pytest.mark.parametrize(("name", "sizes"), [("MultiHeadAttention", (2, 4)), ("GroupedQueryAttention", (4, 2, 1))])
def test_an_axis_of_the_batch_that_is_missing_is_named(name, sizes):
    x = tf.ones((3, 4))
    with pytest.raises(ArgumentError, match=r"\(batch, steps, features\). Received: query.shape=\(3, 4\).*x\[None\]"):
        getattr(layers, name)(*sizes)(x, x)
