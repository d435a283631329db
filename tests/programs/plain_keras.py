"""A program that imports keras_mp and uses stock Keras alone. It prints what it sees of keras_mp as JSON.

Argument: a folder to write files to.
"""

import json
import logging
import os
import pathlib
import pickle
import random
import signal
import sys
import traceback
import types
import warnings
import zipfile

import keras
import numpy as np
import tensorflow as tf

FOLDER = pathlib.Path(sys.argv[1])
X, Y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")


# --- what importing could change -------------------------------------------------------------------------------------


def attributes():
    """Returns the attributes of all modules and classes of Keras and TensorFlow that are loaded, by full name."""
    found, seen = {}, set()

    def look_at(name, owner):
        if id(owner) in seen:
            return
        seen.add(id(owner))
        for key, value in list(vars(owner).items()):
            if key != "__annotations__":  # Python makes it when it is first asked for
                found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__.startswith(("keras.", "tensorflow.")):
                look_at(f"{value.__module__}.{value.__qualname__}", value)

    for name, module in sorted(sys.modules.items(), key=lambda item: (not item[0].startswith("keras.src"), item[0])):
        if name.split(".")[0] in ("keras", "tensorflow") and isinstance(module, types.ModuleType):
            look_at(name, module)
    return found


def changes(before, after):
    """Returns the names of attributes that are others now. Modules that were loaded since then are left out."""
    owners = {name.rpartition(".")[0] for name in before}
    added = {name for name in after.keys() - before.keys() if name.rpartition(".")[0] in owners}
    added = {name for name in added if not isinstance(after[name], types.ModuleType)}
    changed = {name for name in before.keys() & after.keys() if before[name] is not after[name]}
    return sorted(added | changed | before.keys() - after.keys())


def settings():
    """Returns the settings of the process."""
    loggers = {name: logging.getLogger(name) for name in (None, "tensorflow", "absl", "keras")}
    return {
        "environment": dict(os.environ),
        "warnings": [str(each) for each in warnings.filters],
        "showwarning": str(warnings.showwarning),
        "loggers": {str(name): [each.level, str(each.handlers), str(each.filters)] for name, each in loggers.items()},
        "file descriptors": [[os.fstat(each).st_dev, os.fstat(each).st_ino] for each in (0, 1, 2)],
        "streams": [str(each) for each in (sys.stdin, sys.stdout, sys.stderr)],
        "hooks": [str(each) for each in (sys.excepthook, sys.displayhook, sys.unraisablehook)],
        "signals": [str(signal.getsignal(each)) for each in signal.valid_signals()],
        "random numbers": [str(random.getstate()), str(np.random.get_state())],
        "grappler": tf.config.optimizer.get_experimental_options(),
        "policy": keras.config.dtype_policy().name,
        "floatx": keras.config.floatx(),
        "devices": [str(each) for each in tf.config.list_physical_devices()],
        "soft placement": tf.config.get_soft_device_placement(),
        "threads": [
            tf.config.threading.get_intra_op_parallelism_threads(),
            tf.config.threading.get_inter_op_parallelism_threads(),
        ],
    }


# --- errors of stock Keras -------------------------------------------------------------------------------------------


def small(optimizer="sgd", loss="mse", dtype="float32", **kwargs):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype=dtype)])
    model.compile(optimizer, loss, **kwargs)
    return model


class Failing(keras.layers.Layer):
    """Fails where it is told to."""

    def __init__(self, where, **kwargs):
        super().__init__(**kwargs)
        self.where = where

    def fail(self, where):
        if self.where == where:
            raise ValueError(f"failing on purpose: {where}")

    def call(self, x):
        self.fail("call")
        return x

    def get_config(self):
        self.fail("get_config")
        return {**super().get_config(), "where": self.where}

    def save_own_variables(self, store):
        self.fail("save")

    def load_own_variables(self, store):
        self.fail("load")


def of_failing(where):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    model.add(Failing(where))
    return model


def failing_loss(y, p):
    raise ValueError("failing on purpose: loss")


class FailingLoss(keras.losses.Loss):
    """Fails when it is called."""

    def call(self, y, p):
        raise ValueError("failing on purpose: loss")


def failing_in_graph(y, p):
    def fail(x):
        raise ValueError("failing on purpose: in a graph")

    return tf.ensure_shape(tf.py_function(fail, [p], tf.float32), p.shape)


class FailingCallback(keras.callbacks.Callback):
    """Fails where it is told to."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def on_train_begin(self, logs=None):
        if self.where == "begin":
            raise ValueError("failing on purpose: callback")

    def on_epoch_end(self, epoch, logs=None):
        if self.where == "end":
            raise ValueError("failing on purpose: callback")


def load(name, content=None, **members):
    path = FOLDER / f"{name}.keras"
    if content is not None:
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in members.items():
                archive.writestr(member.replace("_json", ".json"), text)
    return keras.saving.load_model(path, custom_objects={"Failing": Failing})


def saved(where):
    path = FOLDER / f"{where}.keras"
    of_failing(where).save(path)
    return path


def load_weights_of_another():
    small().save_weights(FOLDER / "small.weights.h5")
    of_failing("never").load_weights(FOLDER / "small.weights.h5")


CASES = {
    "compile, no such optimizer": lambda: small("no such optimizer"),
    "compile, no such argument": lambda: small(no_such_argument=1),
    "fit, wrong shape": lambda: small().fit(np.ones((4, 5)), Y, verbose=0),
    "fit, loss fails": lambda: small(loss=failing_loss).fit(X, Y, verbose=0),
    "fit, loss object fails": lambda: small(loss=FailingLoss()).fit(X, Y, verbose=0),
    "fit eagerly, loss fails": lambda: small(loss=failing_loss, run_eagerly=True).fit(X, Y, verbose=0),
    "fit, op fails": lambda: small(loss=failing_in_graph).fit(X, Y, verbose=0),
    "fit, callback fails at the begin": lambda: small().fit(X, Y, verbose=0, callbacks=[FailingCallback("begin")]),
    "fit, callback fails at the end": lambda: small().fit(X, Y, verbose=0, callbacks=[FailingCallback("end")]),
    "call fails": lambda: of_failing("call").predict(X, verbose=0),
    "save, layer fails": lambda: saved("save"),
    "save, no configuration": lambda: saved("get_config"),
    "save weights, layer fails": lambda: of_failing("save").save_weights(FOLDER / "failing.weights.h5"),
    "save to nowhere": lambda: small().save(FOLDER / "nowhere" / "model.keras"),
    "pickle, no configuration": lambda: pickle.dumps(of_failing("get_config")),
    "load, no file": lambda: keras.saving.load_model(FOLDER / "nowhere.keras"),
    "load, no archive": lambda: load("text", b"no archive"),
    "load, no configuration": lambda: load("without", other="{}"),
    "load, no JSON": lambda: load("damaged", config_json="{"),
    "load, a list": lambda: load("list", config_json="[]"),
    "load, no weights": lambda: load("weightless", config_json=of_failing("never").to_json()),
    "load, no such class": lambda: keras.saving.load_model(saved("never")),
    "load, layer fails": lambda: keras.saving.load_model(saved("load"), custom_objects={"Failing": Failing}),
    "load weights of another model": load_weights_of_another,
}


def tracebacks():
    told = {}
    for case, fail in CASES.items():
        try:
            fail()
            told[case] = ""
        except Exception:
            told[case] = traceback.format_exc()
    return told


keras.config.disable_traceback_filtering()
small().fit(X, Y, verbose=0)  # loads what Keras loads late
small().save(FOLDER / "small.keras")
attributes_before, settings_before, modules_before = attributes(), settings(), set(sys.modules)

import keras_mp  # noqa: E402

told = {"package": str(pathlib.Path(keras_mp.__file__).parent)}
imported = {name.split(".")[0] for name in set(sys.modules) - modules_before}
told["imported"] = sorted(imported - set(sys.stdlib_module_names))
told["changed at import"] = changes(attributes_before, attributes())
settings_after = settings()
told["settings"] = [key for key, value in settings_before.items() if settings_after[key] != value]
told["tracebacks"] = tracebacks()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for optimizer in ("sgd", keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())):
        small(optimizer, dtype="mixed_float16").fit(X, Y, verbose=0)
told["warnings"] = [str(each.message) for each in seen if each.category.__module__.startswith("keras_mp")]
told["changed before first use"] = changes(attributes_before, attributes())
keras_mp.set_policy("float32")
told["changed at first use"] = changes(attributes_before, attributes())
told["tracebacks after first use"] = tracebacks()
print(json.dumps(told))
