"""Fixtures for all tests, such as the one that keeps a test from changing the next one."""

import functools
import gc

from keras_mp._compat import patches, runtime, tf_replicas

from keras_mp import hardware  # isort: skip  (first, so that TensorFlow's banner stays out of the reports)

import keras
import pytest
import tensorflow as tf
from tensorflow.python.framework import ops

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
    """Gives every test the first global dtype policy and grappler options, and the same random numbers.

    It does so before and after the test: a fixture of a whole module, which trains in float16, comes in between.
    """
    _restore()
    keras.utils.set_random_seed(0)
    yield
    _restore()


def _restore():
    keras.config.set_dtype_policy(_POLICY)
    runtime.set_remapper(_REMAPPER)


@pytest.fixture(params=[True, False], ids=["fast in 16 bits", "slow in 16 bits"])
def gains_from_16_bits(request, monkeypatch):
    """Whether half-precision matmuls are taken to be faster on the CPU, whatever CPU this is."""
    monkeypatch.setattr(hardware, "cpu_gains", lambda dtype: request.param)
    return request.param


def pytest_collection_finish():
    """Leaves imported modules out of all collections, which otherwise take a tenth of the suite's time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Frees the models and traced functions of a file, which take gigabytes by the end of the suite.

    They are in cycles, and Python collects rarely where much is alive. Objects that survive are not collected again.
    """
    if nextitem is None or nextitem.path != item.path:
        _forget_gradients_of_all_reduce()
        keras.utils.clear_session()  # resets the default graph, which keeps every `tf.py_function`, and collects
        gc.freeze()


def _forget_gradients_of_all_reduce():
    """TensorFlow registers the gradient of each `all_reduce` for ever, with its graph; our optimizers have one each."""
    registered = ops.gradient_registry._registry
    for name, entry in list(registered.items()):
        cells = getattr(entry["type"], "__closure__", None) or ()
        inner = [cell for each in cells for cell in getattr(each.cell_contents, "__closure__", None) or ()]
        if any(getattr(cell.cell_contents, "__qualname__", "").startswith("ReplicaContext") for cell in inner):
            del registered[name]
