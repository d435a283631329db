"""Casts that a conversion inserts: operations of a graph and losses of layers compute in float32."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.conversion.casts import Float32Operation
from tests.helpers.conversions import MIXED, converted, same_function

layers, ops = keras.layers, keras.ops


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


OPERATIONS = {
    "sum": lambda h: ops.sum(h, -1, keepdims=True) / 4096,
    "logsumexp": lambda h: ops.logsumexp(h, -1, keepdims=True),
    "cumsum": lambda h: ops.cumsum(h, -1)[:, -1:] / 4096,
    "var": lambda h: ops.var(h, -1, keepdims=True),
    "std": lambda h: ops.std(300 * h, -1, keepdims=True),
    "exp": lambda h: ops.mean(ops.exp(h), -1, keepdims=True) / 1e8,
    "power": lambda h: ops.power(h, 4)[:, :1] / 1e5,
    "argmax": lambda h: ops.cast(ops.argmax(h, -1), "float32")[:, None],
    "norm": lambda h: h[:, :2] / (ops.norm(h, axis=-1, keepdims=True) + 1e-9),
    "mask": lambda h: ops.softmax(h / 100 + ops.cast(h > 25, h.dtype) * -1e9)[:, :4],
    "rsqrt": lambda h: ops.rsqrt(ops.mean(ops.square(100 * h), -1, keepdims=True) + 1e-12),
}


@pytest.mark.parametrize("policy", MIXED)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_a_graph_compute_in_float32(name, policy):
    h = layers.Dense(4096, kernel_initializer="identity")(inputs := keras.Input((4096,)))
    y = layers.Dense(1, kernel_initializer="ones")(layers.Activation("linear")(OPERATIONS[name](h)))
    # Of the largest number for most. Argmax takes the first of those that 16 bits cannot tell apart, so there is one.
    x = 20 + normal(2, 4096)
    x[np.arange(2), [17, 4001]] = 30
    same_function(keras.Model(inputs, y), x, policy, 0.02)


def test_operations_in_float32_come_back_from_a_file(tmp_path):
    h = layers.Dense(64)(inputs := keras.Input((8,)))
    model = keras.Model(inputs, layers.Dense(1)(ops.softmax(h) + ops.sum(h, -1, keepdims=True)))
    copy, _ = converted(model, "mixed_float16")
    copy.save(tmp_path / "model.keras")
    x = normal(2, 8)
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), copy(x))
    assert not any(isinstance(each, Float32Operation) for each in keras_mp.convert(copy, "float32").operations)


class AddsLoss(layers.Layer):
    """Holds a layer, and adds a loss in code of its own."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(8)

    def call(self, x):
        y = self.dense(x)
        self.add_loss(ops.mean(y**2))
        return y


class Penalized(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner, self.out = AddsLoss(), layers.Dense(1)

    def call(self, x):
        y = self.inner(x)
        self.add_loss(1e-2 * ops.sum(y))
        return self.out(y)


@pytest.mark.parametrize("policy", MIXED)
def test_losses_of_layers_are_float32(policy):
    model = Penalized()
    model(normal(8, 4))
    model.compile("sgd", "mse")
    copy, _ = converted(model, policy)
    copy.fit(normal(8, 4), normal(8, 1), verbose=0)
    copy(normal(8, 4))
    assert [loss.dtype for loss in copy.losses] == [tf.float32] * 2
    duplicate = keras_mp.convert(copy, policy)  # and they are after a second conversion
    duplicate(normal(8, 4))
    assert [loss.dtype for loss in duplicate.losses] == [tf.float32] * 2
