"""Keras's own tests of its wrapper, run unchanged on ours: what they ask of theirs, ours does too."""

import keras
import pytest
from keras.src.optimizers import loss_scale_optimizer_test as keras_suite

import keras_mp


@pytest.mark.filterwarnings("ignore:LossScaleOptimizer divides gradients")  # they scale by hand
class TestKerasSuite(keras_suite.LossScaleOptimizerTest):
    """The inherited tests look the class up in their own module; ours stands there while they run."""

    def setUp(self):
        super().setUp()
        theirs = keras_suite.LossScaleOptimizer
        self.addCleanup(setattr, keras_suite, "LossScaleOptimizer", theirs)
        keras_suite.LossScaleOptimizer = keras_mp.LossScaleOptimizer

    def test_init_dynamic_arg(self):
        """The one difference: Keras refuses `dynamic=False`, ours keeps the scale where it is."""
        optimizer = keras_mp.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=8.0, dynamic=False)
        variable = keras.Variable([1.0])
        for gradient in ([8.0], [float("inf")], [8.0]):
            optimizer.apply([keras.ops.array(gradient)], [variable])
        self.assertEqual(float(optimizer.scale_loss(1.0)), 8.0)
        self.assertAllClose(variable, [0.0])


# The base class is only a base here: collected on its own it would test Keras.
del keras_suite.LossScaleOptimizerTest
