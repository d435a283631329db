"""Where a layer's call is executed is asked once, and the ops are told."""

import pytest
import tensorflow as tf

from keras_mp import layers
from keras_mp._compat import execution

# Layers, the shape of their input, and how often their training step asks. Keras calls `convolution_op`, and its
# signature has no place for the value, so `convolution_op` asks again.
LAYERS = {
    "AlphaDropout": (lambda **settings: layers.AlphaDropout(0.5, **settings), (2, 8), 1),
    "Conv1D": (lambda **settings: layers.Conv1D(4, 3, **settings), (2, 8, 2), 1),
    "Conv2D": (lambda **settings: layers.Conv2D(4, 3, padding="same", **settings), (2, 8, 8, 2), 2),
    "Conv2DTranspose": (lambda **settings: layers.Conv2DTranspose(4, 3, **settings), (2, 5, 5, 2), 1),
    "Conv3D": (lambda **settings: layers.Conv3D(4, 2, **settings), (2, 3, 3, 3, 2), 2),
    "Dense": (lambda **settings: layers.Dense(4, **settings), (2, 8), 1),
    "DepthwiseConv1D": (lambda **settings: layers.DepthwiseConv1D(5, **settings), (2, 9, 2), 1),
    "DepthwiseConv2D": (lambda **settings: layers.DepthwiseConv2D(5, **settings), (2, 8, 8, 2), 1),
    "Dropout": (lambda **settings: layers.Dropout(0.5, **settings), (2, 8), 1),
    "EinsumDense": (
        lambda **settings: layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de", **settings),
        (2, 3, 8),
        1,
    ),
    "EinsumDense, other order": (
        lambda **settings: layers.EinsumDense("abc,cd->adb", (5, 4), **settings),
        (2, 4, 8),
        1,
    ),
    "Head": (lambda **settings: layers.Head(4, **settings), (2, 8), 1),
    "PReLU": (lambda **settings: layers.PReLU(**settings), (2, 8), 1),
    "SeparableConv2D": (lambda **settings: layers.SeparableConv2D(4, 5, **settings), (2, 8, 8, 2), 1),
}


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_asks_once_where_it_is_executed(name, policy, monkeypatch):
    make, shape, times = LAYERS[name]
    layer, asked, current = make(dtype=policy), [], execution.current
    layer.build(shape)
    settings = {"training": True} if "Dropout" in name else {}
    monkeypatch.setattr(execution, "current", lambda: asked.append("forward") or current())

    @tf.function(autograph=False)
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **settings)
        asked.append("backward")
        return tape.gradient(y, x)

    gradient.get_concrete_function(tf.TensorSpec(shape))
    assert asked == ["forward"] * times + ["backward"]  # the backward pass is traced elsewhere and could not know
