"""Statistics of layers inside training steps, against NumPy, wherever the steps run."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from keras_mp.diagnostics.taps import Taps

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


def model_of(kind=keras.Model):
    inputs = keras.Input((4,))
    h = keras.layers.Dense(6, name="hidden")(inputs)
    model = kind(inputs, keras.layers.Dense(2, name="last")(keras.ops.relu(h)), name="net")
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    return model


def by_hand(model):
    """Outputs and output gradients of one step over all rows, in float64."""
    (w, b), (v, c) = (layer.get_weights() for layer in model.layers if layer.weights)
    w, b, v, c, x = (each.astype(np.float64) for each in (w, b, v, c, X))
    h = x @ w + b
    y = np.maximum(h, 0) @ v + c
    dy = 2 * (y - Y) / Y.size
    dr = dy @ v.T
    return {("net/hidden", "output"): h, ("net/last", "output"): y, ("net/last", "gradient"): dy,
            ("net/hidden", "gradient"): dr * (h > 0)}  # fmt: skip


def check(taps, expected, steps=1):
    found = {(tap.path, tap.what): each for tap, each in taps.read().items()}
    for key, value in expected.items():
        assert found[key].size == steps * value.size, key
        assert found[key].squares == pytest.approx(steps * (value**2).sum(), rel=1e-4), key
        assert found[key].largest == pytest.approx(np.abs(value).max(), rel=1e-4), key
        assert found[key].zeros == steps * (value == 0).sum(), key


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", [keras.Model, keras_mp.Model])
def test_fit_adds_up_every_step(kind, jit_compile):
    model = model_of(kind)
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    taps = Taps(model)
    with taps.active():
        model.fit(X, Y, batch_size=8, epochs=3, verbose=0)
    check(taps, by_hand(model), steps=3)


def test_several_steps_in_one_execution():
    model = model_of()
    model.compile(keras.optimizers.SGD(0.0), "mse", steps_per_execution=2)
    taps = Taps(model)
    with taps.active():
        model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    check(taps, by_hand(model))


@pytest.mark.parametrize("kind", [keras.Model, keras_mp.Model])
def test_replicas_add_up(kind, mirrored):
    with mirrored(2).scope():
        model = model_of(kind)
    taps = Taps(model)
    with taps.active():
        model.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    found = {(tap.path, tap.what): each for tap, each in taps.read().items()}
    expected = by_hand(model)["net/hidden", "output"]
    assert found["net/hidden", "output"].size == expected.size
    assert found["net/hidden", "output"].squares == pytest.approx((expected**2).sum(), rel=1e-4)
    assert found["net/last", "gradient"].size == Y.size


def test_no_number_changes_and_none_is_kept_off():
    one, other = model_of(), model_of()
    other.set_weights(one.get_weights())
    for model in (one, other):
        model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    taps = Taps(one)
    with taps.active():
        one.fit(X, Y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    other.fit(X, Y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    operations = [[operation.type for operation in _graph(model)] for model in (one, other)]
    assert operations[0] == operations[1]


def _graph(model):
    """What a step is traced to when nothing is active."""
    return tf.function(model.train_step).get_concrete_function((tf.constant(X), tf.constant(Y))).graph.get_operations()


def test_loops_of_recurrent_layers_are_followed():
    model = keras.Sequential([keras.Input((5, 3)), keras.layers.RNN(keras.layers.SimpleRNNCell(2, name="cell"))])
    taps = Taps(model)
    with taps.active():
        tf.function(lambda x: model(x))(tf.ones((4, 5, 3)))
    sizes = [found.size for tap, found in taps.read().items() if tap.what == "output" and tap.path.endswith("cell")]
    # Keras calls the cell once more for the first timestep, to learn shapes.
    assert sizes == [4 * 2 * (5 + 1)] * 2


def test_layers_are_chosen_by_pattern():
    model = model_of()
    taps = Taps(model, layers="hidden$", what=["output"])
    with taps.active():
        model(X)
    assert [(tap.path, tap.what) for tap in taps.read()] == [("net/hidden", "output")]
    taps.reset()
    assert [found.size for found in taps.read().values()] == [0]


def test_symbolic_calls_are_not_followed():
    class Holder(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = keras.layers.Dense(2)

        def call(self, x):
            return self.inner(tf.identity(x))  # in a scratch graph, where tensors are TensorFlow's

    model = Holder()
    model(tf.ones((1, 4)))
    taps = Taps(model)
    with taps.active():
        model(keras.Input((4,)))
    assert taps.read() == {}
