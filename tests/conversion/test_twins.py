"""The layers here that take the place of Keras's, and a warning for those that do not."""

import warnings

import keras
import numpy as np
import pytest

import keras_mp
from keras_mp.errors import KerasMPWarning
from tests.helpers.conversions import TOLERANCE, normal

layers = keras.layers


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("rank", [1, 2])
def test_convolutional_lstms(rank, policy):
    inputs = keras.Input((3, *[6] * rank, 2))
    x = getattr(layers, f"ConvLSTM{rank}D")(3, 3, return_sequences=True)(inputs)
    model = keras.Model(inputs, getattr(layers, f"ConvLSTM{rank}D")(2, 3)(x))
    converted = keras_mp.convert(model, policy)
    given = normal(2, 3, *[6] * rank, 2)
    expected = model(given).numpy()
    tolerance = TOLERANCE.get(policy, 0) * np.abs(expected).max()
    np.testing.assert_allclose(converted(given), expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(keras_mp.convert(converted, "float32")(given), expected)


@pytest.mark.parametrize(
    ("layer", "policy", "warned"),
    [
        (lambda: keras.layers.DepthwiseConv2D(3, strides=2), "mixed_bfloat16", True),
        (lambda: keras.layers.DepthwiseConv2D(5), "mixed_bfloat16", True),
        (lambda: keras.layers.DepthwiseConv2D(3), "mixed_bfloat16", False),
        (lambda: keras.layers.DepthwiseConv2D(5), "float32", False),
        (lambda: keras_mp.layers.DepthwiseConv2D(5), "mixed_bfloat16", False),
    ],
)
def test_slow_convolutions_of_keras_are_told_of_before_training(layer, policy, warned):
    with keras_mp.policy_scope(policy):
        model = keras.Sequential([keras.Input((8, 8, 2)), layer(), keras.layers.Flatten(), keras.layers.Dense(1)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.compile("sgd", "mse")
    told = [str(each.message) for each in caught if "takes longer to train in bfloat16" in str(each.message)]
    assert len(told) == warned
    if warned:
        assert "depthwise_conv2d" in told[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*gains nothing on this", KerasMPWarning)
            keras_mp.convert(model, "mixed_bfloat16").compile("sgd", "mse")
