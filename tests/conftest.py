"""Fixtures that every test gets without asking, so that no test can change what the next one sees."""

import functools
import gc
import os

# The suite runs one process a core; TensorFlow would start as many threads in each.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from keras_mp._compat import patches, runtime, tf_replicas

from keras_mp import hardware  # isort: skip  (first, so that TensorFlow's banner stays out of the reports)

import keras
import pytest
import tensorflow as tf

# Whatever test runs first, all see the same Keras: the one after the first use of keras_mp.
patches.install_on_first_use()

# Replicas without GPUs: several logical devices on the one CPU. They can only be had before the runtime starts.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


@functools.cache
def _mirrored(replicas):
    # One strategy over the same devices serves all tests.
    return tf_replicas.mirrored_strategy([f"CPU:{index}" for index in range(replicas)])


@pytest.fixture(scope="session")
def mirrored():
    """A function from a number of replicas to the session's `MirroredStrategy` over so many logical CPU devices."""
    return _mirrored


_POLICY, _REMAPPER = keras.config.dtype_policy(), runtime.remapper_enabled()


@pytest.fixture(autouse=True)
def _isolated_global_state():
    """Gives every test the global dtype policy and grappler's options of the start, and the same random numbers.

    Before it as well as after it: a fixture of a whole module, which trains in float16, comes in between.
    """
    _restore()
    keras.utils.set_random_seed(0)
    yield
    _restore()


def _restore():
    keras.config.set_dtype_policy(_POLICY)
    runtime.set_remapper(_REMAPPER)


def pytest_configure(config):
    """Whether a policy gains something is the hardware's to say; test_policy.py is about what is said of it."""
    config.addinivalue_line("filterwarnings", "ignore:.*gains nothing on this:keras_mp.errors.KerasMPWarning")


@pytest.fixture(params=[True, False], ids=["fast in 16 bits", "slow in 16 bits"])
def gains_from_16_bits(request, monkeypatch):
    """Whether the CPU is taken to gain from products in 16 bits, whatever CPU is here."""
    monkeypatch.setattr(hardware, "cpu_gains", lambda dtype: request.param)
    return request.param


def pytest_collection_finish():
    """What is imported by now stays; to look through it at every collection takes a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """A `stock_defect` test states what stock Keras should do; the day it does, the report says XPASS."""
    for item in items:
        if item.get_closest_marker("stock_defect"):
            item.add_marker(
                pytest.mark.xfail(raises=AssertionError, reason="stock Keras gets this wrong", strict=False)
            )
