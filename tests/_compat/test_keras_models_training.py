import keras
import numpy as np

from keras_mp._compat import keras_models


def nested():
    inner = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="leaf")], name="inner")
    return keras.Sequential([keras.Input((2,)), inner], name="outer")


def test_layers_at_any_depth_are_listed():
    model = nested()
    assert {"outer", "inner", "leaf"} <= {layer.name for layer in keras_models.layers(model)}
    inside = {layer.name for layer in keras_models.children(model)}
    assert {"inner", "leaf"} <= inside
    assert "outer" not in inside


def test_the_loss_and_the_metrics_are_those_of_compile():
    model = nested()
    model.compile("sgd", loss="mse")
    (loss,) = keras_models.loss_and_metrics(model)
    assert float(loss(np.zeros((1, 3)), np.ones((1, 3)))) == 1.0
    model.compile("sgd", loss="mse", metrics=["mae"])
    assert len(keras_models.loss_and_metrics(model)) == 2


def test_the_tracker_is_the_metric_that_fit_reports():
    model = nested()
    model.compile("sgd", loss="mse")
    assert keras_models.loss_tracker(model) is model.metrics[0]
