"""Keras layers that compute in float32 what 16 bits cannot hold."""

from keras_mp.layers.float32 import Float32
from keras_mp.layers.normalization import BatchNormalization, LayerNormalization
from keras_mp.layers.softmax import Softmax

__all__ = ["BatchNormalization", "Float32", "LayerNormalization", "Softmax"]
