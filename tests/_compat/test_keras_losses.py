"""Keras's losses. Each test fails with the private name in its docstring when that moves."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_losses


def test_losses_are_those_of_a_replicas_rows_inside_share_of_batch():
    """Rests on `reduce_values`, `apply_mask` and the two scalings of `keras.src.losses.loss`."""
    labels, predictions = np.zeros((2, 3)), tf.constant([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    weights = np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    mask = tf.constant([[True, True, True], [True, False, False]])

    class Absolute(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return keras.ops.abs(y_true - y_pred)

    def loss(reduction="sum_over_batch_size", sample_weight=None, masked=False, share=0.25):
        absolute = Absolute(reduction=reduction)
        # This replica has a quarter of the rows, and a tenth of what is not masked, or of the weights.
        with keras_losses.share_of_batch(None if share is None else tf.constant(share), lambda mine: 10 * mine):
            prediction = keras_layers.with_mask(tf.identity(predictions), mask) if masked else predictions
            return float(absolute(labels, prediction, sample_weight))

    assert loss() == 3.5
    assert loss("sum") == 21 * 4  # times the share it is the sum
    assert loss(masked=True) == pytest.approx(10 / 4 / 10 * 4)
    assert loss("mean_with_sample_weight", weights) == pytest.approx(14 / 4 / 10 * 4)
    assert loss(masked=True, share=None) == pytest.approx(10 / 4)  # as Keras has it
    assert loss("sum", share=None) == 21


def test_trackers_of_single_losses_take_means_over_replicas(mirrored):
    """Rests on `unscale_loss_for_distribution`, and that `CompileLoss` looks it up in `keras.src.losses.loss`."""
    from keras.src.losses import loss

    with mirrored(2).scope(), keras_losses.share_of_batch(tf.constant(0.25), tf.identity):
        assert float(loss.unscale_loss_for_distribution(tf.constant(8.0))) == 4.0
        assert float(loss.scale_loss_for_distribution(tf.constant(8.0))) == 8.0
