"""Resizing: the contract, XLA in 16 bits, images in pipelines, and what the stock layers lose or refuse."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp import layers
from tests.contract.layer_contract import Case, assert_close, contract, gradients

INTERPOLATIONS = ["nearest", "bilinear", "bicubic", "lanczos3", "lanczos5", "area"]


def up(size, interpolation, **kwargs):
    return Case(
        lambda: layers.UpSampling2D(size, interpolation=interpolation, **kwargs),
        lambda: keras.layers.UpSampling2D(size, interpolation=interpolation, **kwargs),
        [(2, 3, 4, 2) if kwargs.get("data_format") != "channels_first" else (2, 2, 3, 4)],
        masked=False,  # neither takes a mask
    )


def resize(shape, *args, **kwargs):
    return Case(
        lambda: layers.Resizing(*args, **kwargs), lambda: keras.layers.Resizing(*args, **kwargs), [shape], masked=False
    )


CASES = {
    "up nearest": up((2, 3), "nearest"),
    "up nearest, power of two": up(2, "nearest"),
    "up nearest, channels_first": up((2, 3), "nearest", data_format="channels_first"),
    "up bilinear": up((2, 3), "bilinear"),
    "up bilinear, channels_first": up((3, 1), "bilinear", data_format="channels_first"),
    "up bicubic": up((1, 2), "bicubic"),
    "up lanczos3": up(2, "lanczos3"),
    "up lanczos5": up(2, "lanczos5"),
    "nearest": resize((2, 5, 7, 3), 8, 3, "nearest"),
    "bilinear": resize((2, 5, 7, 3), 8, 3),
    "bilinear, antialias": resize((2, 5, 7, 3), 2, 9, antialias=True),
    "bicubic": resize((2, 5, 7, 3), 8, 3, "bicubic"),
    "bicubic, antialias": resize((2, 5, 7, 1), 8, 3, "bicubic", antialias=True),
    "lanczos3, channels_first": resize((2, 3, 5, 7), 8, 3, "lanczos3", data_format="channels_first"),
    "lanczos5, antialias": resize((2, 5, 7, 3), 3, 3, "lanczos5", antialias=True),
    "crop": resize((2, 5, 9, 3), 4, 4, crop_to_aspect_ratio=True),
    "crop rows": resize((2, 9, 4, 3), 3, 5, crop_to_aspect_ratio=True),
    "pad": resize((2, 5, 9, 3), 4, 4, pad_to_aspect_ratio=True, fill_value=0.5),
    "pad columns, channels_first": resize((2, 3, 8, 3), 3, 5, pad_to_aspect_ratio=True, data_format="channels_first"),
}


def stock_can(name, policy):
    """TensorFlow has no kernel of these for float64, so that the stock layers cannot say what is right there; a test
    below compares with finite differences.
    """
    return policy != "float64" or not any(word in name for word in ("lanczos", "antialias"))


@contract(CASES, stock_can)
def test_contract(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_float64_and_finite_differences(interpolation, antialias):
    x = np.random.normal(size=(1, 5, 7, 2))
    arguments = {"interpolation": interpolation, "antialias": antialias}
    layer = layers.Resizing(3, 9, **arguments, dtype="float64")
    y = layer(x)
    assert y.dtype == tf.float64
    assert_close(y, keras.layers.Resizing(3, 9, **arguments, dtype="float32")(x.astype("float32")), 2e-6)
    theoretical, numerical = tf.test.compute_gradient(tf.function(layer), [tf.constant(x)])
    assert_close(theoretical[0], numerical[0], 1e-6)


def compiles(layer, dtype):
    """Whether XLA compiles the layer and its gradient."""
    x = tf.cast(np.random.default_rng(0).normal(size=(2, 5, 7, 3)), dtype)
    upstream = tf.ones(layer.compute_output_shape(x.shape), dtype)

    try:
        result = tf.function(lambda x: gradients(layer, x, upstream, {}), jit_compile=True)(x)
    except (tf.errors.OpError, TypeError, ValueError):
        return False
    return all(np.isfinite(np.asarray(tf.cast(value, "float32"))).all() for value in result.values())


@pytest.mark.parametrize(
    ("interpolation", "dtype"),
    [
        pytest.param(interpolation, dtype, marks=() if number % 2 == half else pytest.mark.slow)
        for number, interpolation in enumerate(INTERPOLATIONS)
        for half, dtype in enumerate(("float16", "bfloat16"))
    ],
)
def test_xla_compiles_in_16_bits(interpolation, dtype):
    assert compiles(layers.UpSampling2D(2, interpolation=interpolation, dtype=f"mixed_{dtype}"), dtype)
    for arguments in ({}, {"antialias": True}, {"crop_to_aspect_ratio": True}, {"pad_to_aspect_ratio": True}):
        layer = layers.Resizing(4, 4, interpolation, **arguments, dtype=f"mixed_{dtype}")
        assert compiles(layer, dtype)


@pytest.mark.stock_defect
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos3", "lanczos5"])
def test_stock_xla_compiles_up_sampling_in_16_bits(interpolation, dtype):
    """As in keras-team/keras#20931, where it was bilinear; that compiles with TensorFlow 2.21."""
    assert compiles(keras.layers.UpSampling2D(2, interpolation=interpolation, dtype=f"mixed_{dtype}"), dtype)


@pytest.mark.stock_defect
@pytest.mark.parametrize("arguments", [{"interpolation": "bicubic"}, {"antialias": True}])
def test_stock_xla_compiles_resizing_even_in_float32(arguments):
    assert compiles(keras.layers.Resizing(4, 4, **arguments, dtype="float32"), "float32")


@pytest.mark.parametrize("interpolation", [each for each in INTERPOLATIONS if each != "nearest"])
def test_xla_and_the_kernels_agree(interpolation):
    """The matrices are those of the kernels, not others of the same name."""
    x = tf.constant(np.random.normal(size=(2, 5, 7, 3)), "float32")
    upstream = tf.constant(np.random.normal(size=(2, 8, 3, 3)), "float32")
    for antialias in (False, True):
        layer = layers.Resizing(8, 3, interpolation, antialias=antialias)
        step = tf.function(lambda x: gradients(layer, x, upstream, {}), jit_compile=True)  # noqa: B023
        plain = gradients(layer, x, upstream, {})
        for name, value in step(x).items():
            assert_close(value, plain[name], 2e-6)


def gradient_in_16_bits(layer):
    """The gradient to a bfloat16 image, and whether there is one at all."""
    x = tf.cast(np.random.default_rng(0).normal(size=(1, 5, 7, 2)), "bfloat16")
    try:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.cast(layer(x), "float32") ** 2)
        gradient = tape.gradient(loss, x)
    except (tf.errors.OpError, TypeError, ValueError, LookupError):
        gradient = None
    return np.zeros(x.shape) if gradient is None else np.asarray(gradient, "float64")


def right_gradient(interpolation):
    layer = layers.Resizing(3, 9, interpolation, dtype="float64")  # checked by finite differences above
    x = tf.cast(tf.cast(np.random.default_rng(0).normal(size=(1, 5, 7, 2)), "bfloat16"), "float64")
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x) ** 2)
    return tape.gradient(loss, x)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_gradient_in_16_bits(interpolation):
    layer = layers.Resizing(3, 9, interpolation, dtype="mixed_bfloat16")
    assert_close(gradient_in_16_bits(layer), right_gradient(interpolation), 1e-2)  # two roundings to bfloat16


@pytest.mark.stock_defect
@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos3", "lanczos5", "area"])
def test_stock_gradient_in_16_bits(interpolation):
    layer = keras.layers.Resizing(3, 9, interpolation, dtype="mixed_bfloat16")
    assert_close(gradient_in_16_bits(layer), right_gradient(interpolation), 1e-2)


def gradient_of_wide_repeat(layer):
    x = tf.ones((1, 1, 1, 1), "bfloat16")
    upstream = tf.cast(np.random.default_rng(0).uniform(0.5, 1, (1, 48, 48, 1)), "bfloat16")
    expected = float(np.asarray(upstream, "float64").sum())
    return abs(float(gradients(layer, x, upstream, {})["x"][0, 0, 0, 0]) / expected - 1)


@pytest.mark.parametrize("size", [(48, 48), (64, 64)])
def test_gradient_of_many_copies_is_added_in_float32(size):
    layer = layers.UpSampling2D(size, dtype="mixed_bfloat16")
    upstream = tf.cast(np.random.default_rng(0).uniform(0.5, 1, (2, *size, 3)), "bfloat16")
    expected = np.asarray(upstream, "float64").sum((1, 2), keepdims=True)
    for jit_compile in (False, True):
        step = tf.function(lambda x: gradients(layer, x, upstream, {})["x"], jit_compile=jit_compile)
        actual = np.asarray(step(tf.ones((2, 1, 1, 3), "bfloat16")), "float64")
        np.testing.assert_allclose(actual, expected, rtol=2.0**-8)  # one rounding to bfloat16


def test_gradient_of_nearest_resizing_is_added_in_float32():
    layer = layers.Resizing(48, 48, "nearest", dtype="mixed_bfloat16")
    assert gradient_of_wide_repeat(layer) < 2.0**-8


@pytest.mark.stock_defect
def test_stock_gradient_of_nearest_resizing_is_added_in_float32():
    assert gradient_of_wide_repeat(keras.layers.Resizing(48, 48, "nearest", dtype="mixed_bfloat16")) < 2.0**-8


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "lanczos3"])
@pytest.mark.parametrize("ratio", ["crop_to_aspect_ratio", "pad_to_aspect_ratio", None])
def test_in_a_pipeline_of_images_of_many_sizes(ratio, interpolation, policy):
    sizes = [(5, 9), (9, 5), (6, 6)]
    images = [np.random.randint(0, 256, (*size, 3)).astype("uint8") for size in sizes]
    arguments = {"interpolation": interpolation, **({ratio: True} if ratio else {})}
    layer = layers.Resizing(4, 6, **arguments, dtype=policy)
    stock = keras.layers.Resizing(4, 6, **arguments, dtype="float32")
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(images), output_signature=tf.TensorSpec((None, None, 3), "uint8")
    )
    for image, actual in zip(images, dataset.map(layer), strict=True):
        assert (actual.shape, actual.dtype) == ((4, 6, 3), layer.compute_dtype)
        tolerance = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[layer.compute_dtype]
        assert_close(np.asarray(actual, "float64"), stock(image.astype("float32")), tolerance)


def labels_and_boxes(layer):
    """What a pipeline makes of class 2049 in a mask, of label 2049 and of a box at 1001."""
    data = {
        "images": np.ones((1, 2048, 2048, 1), "float32"),
        "segmentation_masks": np.full((1, 2048, 2048, 1), 2049, "int32"),
        "labels": np.array([2049]),
        "bounding_boxes": {"boxes": np.array([[[0, 0, 1001, 1003]]], "float32"), "labels": np.array([[2049]])},
    }
    (result,) = tf.data.Dataset.from_tensors(data).map(lambda data: layer(data))
    return [
        float(tf.reduce_max(result["segmentation_masks"])),
        float(result["labels"][0]),
        *np.asarray(result["bounding_boxes"]["boxes"], "float64").ravel()[2:].tolist(),
    ]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_labels_and_boxes_keep_their_dtype_in_a_pipeline(policy):
    layer = layers.Resizing(1024, 1024, bounding_box_format="xyxy", dtype=policy)
    assert labels_and_boxes(layer) == [2049, 2049, 500.5, 501.5]


@pytest.mark.stock_defect
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_stock_labels_and_boxes_keep_their_dtype_in_a_pipeline(policy):
    try:
        values = labels_and_boxes(keras.layers.Resizing(1024, 1024, bounding_box_format="xyxy", dtype=policy))
    except (TypeError, ValueError) as error:
        values = error
    assert values == [2049, 2049, 500.5, 501.5]


def test_one_image_and_the_data_it_came_in():
    image = np.random.normal(size=(5, 7, 3)).astype("float32")
    layer = layers.Resizing(3, 4)
    expected = keras.layers.Resizing(3, 4)(image)
    assert_close(layer(image), expected, 1e-6)
    data = {"images": image}
    assert_close(layer(data)["images"], expected, 1e-6)
    assert data["images"].shape == (5, 7, 3)


def test_a_model_of_images_of_any_size():
    inputs = keras.Input((None, None, 3))
    for layer in (layers.UpSampling2D(2, interpolation="bilinear"), layers.UpSampling2D((3, 2))):
        layer.dtype_policy = "mixed_bfloat16"
        model = keras.Model(inputs, layer(inputs))
        assert model.output_shape == (None, None, None, 3)
        assert model.predict(np.ones((2, 4, 5, 3), "float32"), verbose=0).shape[1:] == (4 * layer.size[0], 10, 3)


def test_refusals():
    for make in (lambda how: layers.UpSampling2D(2, interpolation=how), lambda how: layers.Resizing(2, 2, how)):
        with pytest.raises(ValueError, match="Invalid value for argument `interpolation`. .*interpolation=cubic"):
            make("cubic")
    with pytest.raises(ValueError, match="Only `'constant'` is supported. Received: fill_mode=reflect"):
        layers.Resizing(2, 2, pad_to_aspect_ratio=True, fill_mode="reflect")
    with pytest.raises(ValueError, match="Only one of `pad_to_aspect_ratio` & `crop_to_aspect_ratio` can be `True`"):
        layers.Resizing(2, 2, pad_to_aspect_ratio=True, crop_to_aspect_ratio=True)
    for height in (0, 2.5, None, True):
        with pytest.raises(keras_mp.errors.ArgumentError, match="`height` must be a positive int.*Type height=224"):
            layers.Resizing(height, 2)
    with pytest.raises(ValueError, match="`data_format` argument must be one of"):
        layers.UpSampling2D(2, data_format="channels")
    with pytest.raises(ValueError, match="The `size` argument must be a tuple of 2 integers"):
        layers.UpSampling2D((2, 2, 2))
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        layers.UpSampling2D(2)(keras.Input((4, 3)))
    for data in (np.ones((2, 3)), keras.Input((2, 3, 4, 5))):
        with pytest.raises(ValueError, match=r"to have rank 3 \(single image\) or 4 \(batch of images\)"):
            layers.Resizing(2, 2)(data)


def test_xla_refuses_sizes_that_are_not_static_in_words():
    layer = layers.UpSampling2D(2, interpolation="bilinear")
    step = tf.function(layer, jit_compile=True, input_signature=[tf.TensorSpec((2, None, 4, 1))])
    with pytest.raises(keras_mp.errors.ArgumentError, match="not static. .*type jit_compile=False"):
        step(tf.ones((2, 3, 4, 1)))


def repeating(name, shape, **settings):
    make = (
        functools.partial(getattr(layers, name), **settings),
        functools.partial(getattr(keras.layers, name), **settings),
    )
    return Case(*make, [shape], masked=False)  # Keras's layers do not pass masks on, and warn


REPEATING = {
    "RepeatVector": repeating("RepeatVector", (4, 5), n=3),
    "UpSampling1D": repeating("UpSampling1D", (2, 3, 4), size=3),
    "UpSampling3D": repeating("UpSampling3D", (2, 2, 1, 3, 2)),
    "UpSampling3D, two axes": repeating("UpSampling3D", (2, 2, 1, 3, 2), size=(2, 2, 1)),
    "UpSampling3D, channels first": repeating("UpSampling3D", (2, 2, 1, 3, 2), size=3, data_format="channels_first"),
}


@contract(REPEATING)
def test_contract_of_repeating(check, tmp_path, mirrored):
    check(tmp_path, mirrored(2))


def check_sum_of_copies(of):
    x = tf.ones((1, 2), "float16")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = of.RepeatVector(5000, dtype="mixed_float16")(x)
    np.testing.assert_array_equal(tape.gradient(y, x), [[5000.0, 5000.0]])


def test_the_gradients_of_copies_are_summed_in_float32():
    check_sum_of_copies(layers)


@pytest.mark.stock_defect
def test_the_gradients_of_stock_copies_are_summed_in_float32():
    check_sum_of_copies(keras.layers)
