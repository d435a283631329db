"""Every change that importing keras_mp makes to TensorFlow and Keras, made by one function."""

import tensorflow as tf

from keras_mp._compat import graph_errors, keras_files, keras_losses

__all__ = ["install"]


def install() -> None:
    """Makes the changes."""
    tf.errors.UnknownError.__new__ = staticmethod(graph_errors._unknown_error_or_its_cause)
    keras_losses.install()
    keras_files.install()
