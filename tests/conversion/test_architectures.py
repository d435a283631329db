"""Architectures that others have built convert, compute the same, train under both mixed policies, and return."""

import itertools
import os

os.environ.setdefault("KERAS_HUB_HOME", os.devnull)  # nothing is downloaded here

import warnings

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

import keras_mp

pytestmark = [
    # KerasHub's T5 says so when it is made.
    pytest.mark.filterwarnings("ignore:.*does not support masking and will therefore destroy:UserWarning"),
]

MIXED = ("mixed_bfloat16", "mixed_float16")

# Of the largest output: the deepest of these round some hundred times on the way.
TOLERANCE = {"mixed_bfloat16": 4e-2, "mixed_float16": 8e-3}

APPLICATIONS = sorted(name for name, make in vars(keras.applications).items() if callable(make) and name[0].isupper())
# One of each kind of layer beside those of the backbones below; `make test-all` converts all under both policies.
SMALL = {"ConvNeXtTiny": "mixed_float16", "MobileNetV3Small": "mixed_bfloat16"}


def application(name):
    size = 331 if name == "NASNetLarge" else 75 if "Inception" in name or name == "Xception" else 32
    arguments = {"alpha": 0.25} if name == "MobileNet" else {"alpha": 0.35} if name == "MobileNetV2" else {}
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None, **arguments)
    x = np.random.uniform(-1, 1, size=(2, size, size, 3)).astype("float32")
    rescales = any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers)
    return model, 127.5 * (x + 1) if rescales else x


IDS = np.random.default_rng(0).integers(1, 50, size=(2, 12))
PADDING = np.arange(12)[None, :] < np.array([[12], [8]])
SIZES = {"vocabulary_size": 50, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
IMAGES = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype("float32")
BACKBONES = {
    "BERT": (
        lambda: keras_hub.models.BertBackbone(**SIZES, max_sequence_length=12),
        {"token_ids": IDS, "segment_ids": IDS * 0, "padding_mask": PADDING},
    ),
    "GPT-2": (
        lambda: keras_hub.models.GPT2Backbone(**SIZES, max_sequence_length=12),
        {"token_ids": IDS, "padding_mask": PADDING},
    ),
    "T5": (
        lambda: keras_hub.models.T5Backbone(**SIZES),
        {
            "encoder_token_ids": IDS,
            "encoder_padding_mask": PADDING,
            "decoder_token_ids": IDS,
            "decoder_padding_mask": PADDING,
        },
    ),
    "ViT": (
        lambda: keras_hub.models.ViTBackbone(
            image_shape=(32, 32, 3), patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
        ),
        IMAGES,
    ),
    "ResNet": (
        lambda: keras_hub.models.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64, 64],
            stackwise_num_blocks=[1, 1],
            stackwise_num_strides=[1, 2],
            block_type="basic_block",
            image_shape=(32, 32, 3),
        ),
        IMAGES,
    ),
}


def normalizations(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def awake(model, x):
    """The model with the scale of its own data in its batch statistics: untrained, a deep network's signal dies away.

    One scale for all channels of a layer: means and variances of two images' channels would blow roundings up.
    """
    found = normalizations(model)
    momenta = [layer.momentum for layer in found]
    for layer in found:
        layer.momentum = 0.0
    if found:
        model(x, training=True)
    for layer, momentum in zip(found, momenta, strict=True):
        layer.momentum = momentum
        squares = np.mean(np.square(layer.moving_mean) + layer.moving_variance)
        layer.moving_mean.assign(np.zeros(layer.moving_mean.shape))
        layer.moving_variance.assign(np.full(layer.moving_variance.shape, squares))
    return model


def squares(scale, prediction):
    return tf.reduce_mean(tf.square(tf.cast(prediction, tf.float32) / tf.reduce_max(scale)))


def error(answers, expected):
    """The largest difference of each output, relative to the largest that is right."""
    answers = [np.asarray(answer) for answer in keras.tree.flatten(answers)]
    return max(np.abs(a - e).max() / np.abs(e).max() for a, e in zip(answers, expected, strict=True))


def allowed(make, policy, model, x, expected):
    """Untrained, some of these blow roundings up whoever makes them: then as far off as Keras's own model, times four.

    Both are one draw of the same noise, of a handful of numbers; over seeds either is the larger, by up to three times.
    """
    with keras_mp.policy_scope(policy):
        stock = make()
    stock.set_weights(model.get_weights())
    return 4 * error(keras.tree.map_structure(lambda y: tf.cast(y, tf.float32), stock(x)), expected)


def check(model, x, jit_compile, make, trained_under):
    """Converts under both policies, compares, converts back, and trains a step under one of them.

    A step of float16 without XLA is taken eagerly: most of what a test takes is the tracing of steps, and in a graph
    it is the same. With XLA both are compiled.
    """
    expected = [np.asarray(output) for output in keras.tree.flatten(model(x))]
    for policy in MIXED:
        mixed = keras_mp.convert(model, policy)
        assert type(mixed) is type(model)
        answers = mixed(x)
        assert {answer.dtype for answer in keras.tree.flatten(answers)} == {tf.float32}
        back = keras_mp.convert(mixed, "float32")
        for answer, right in zip(keras.tree.flatten(back(x)), expected, strict=True):
            np.testing.assert_array_equal(answer, right)
        off = error(answers, expected)
        if np.isnan(off):  # the signal of an untrained EfficientNetV2M outgrows float16, whoever made it
            assert policy == "mixed_float16"
            assert np.isnan(allowed(make, policy, model, x, expected))
            continue
        assert off <= TOLERANCE[policy] or off <= allowed(make, policy, model, x, expected)
        if policy != trained_under:
            continue
        if policy == "mixed_float16":
            # Over two images' few pixels, batch statistics make gradients so steep that float16 does not hold them.
            for layer in normalizations(mixed):
                layer.trainable = False
        for compiled in jit_compile:
            optimizer = keras_mp.LossScaleOptimizer(
                keras.optimizers.SGD(1e-3), initial_scale=2.0**-8, jit_compile=False
            )
            eagerly = policy == "mixed_float16" and not compiled
            mixed.compile(optimizer, squares, jit_compile=compiled, run_eagerly=eagerly)
            targets = keras.tree.map_structure(lambda output: np.full((len(output), 1), np.abs(output).max()), mixed(x))
            before = [np.asarray(weight) for weight in mixed.trainable_weights]
            history = mixed.fit(x, targets, verbose=0)
            assert np.isfinite(history.history["loss"][0])
            assert int(optimizer.skipped_steps) == 0
            pairs = zip(mixed.trainable_weights, before, strict=True)
            assert any(not np.array_equal(weight, value) for weight, value in pairs)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(name, policy, marks=() if SMALL.get(name) == policy else pytest.mark.slow)
        for name in APPLICATIONS
        for policy in MIXED
    ],
)
def test_an_application_converts_trains_and_returns(name, policy):
    model, x = application(name)
    check(awake(model, x), x, [False], lambda: application(name)[0], policy)


# XLA takes a minute or more to compile the training step of one on a CPU; test_convert.py has smaller models.
@pytest.mark.slow
@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_trains_compiled_by_xla(name, policy):
    model, x = application(name)
    check(awake(model, x), x, [True], lambda: application(name)[0], policy)


@pytest.mark.parametrize(
    ("name", "policy", "jit_compile"),
    [
        pytest.param(*each, marks=() if each == (name, MIXED[number % 2], False) else pytest.mark.slow)
        for number, name in enumerate(BACKBONES)
        for each in itertools.product([name], MIXED, [False, True])
    ],
)
def test_a_backbone_converts_trains_and_returns(name, policy, jit_compile):
    make, x = BACKBONES[name]
    model = awake(make(), x)
    with warnings.catch_warnings():
        # T5's attention hides with -1e9, which float16 does not hold; its own code is float32, and no layer is left so.
        warnings.filterwarnings("ignore", "Layer '\\w+' .of type T5MultiHeadAttention. was passed an input with a mask")
        check(model, x, [jit_compile], make, policy)
