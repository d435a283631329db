"""Keeps a search from changing the program that asks for it."""

import contextlib
import random
import warnings
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import runtime

__all__ = ["nothing_else_changed"]


@contextlib.contextmanager
def nothing_else_changed() -> Iterator[None]:
    """Restores the global policy, the remapper and the random states of Python and NumPy, and silences warnings."""
    policy, remapper = keras.config.dtype_policy(), runtime.remapper_enabled()
    logger = tf.get_logger()  # it warns that several models retrace
    level = logger.level
    logger.setLevel("ERROR")
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the findings say what matters about the copies
            yield
    finally:
        logger.setLevel(level)
        keras.config.set_dtype_policy(policy)
        runtime.set_remapper(remapper)
        random.setstate(python)
        np.random.set_state(numpy)
