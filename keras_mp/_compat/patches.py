"""Every lasting change that keras_mp makes to TensorFlow and Keras. `docs/importing.md` explains each.

`install` makes the changes for an import. `install_on_first_use` makes the changes for the first policy, optimizer,
layer or model of keras_mp. `replacing` makes the changes that last for one block.
"""

import keras
import tensorflow as tf
from keras.src.saving import saving_lib as _saving_lib

from keras_mp._compat import graph_errors, keras_files, keras_hooks
from keras_mp._compat.replacing import around

__all__ = ["install", "install_on_first_use"]


def install() -> None:
    """Makes the changes that concern model files."""
    _saving_lib.naming = keras_files.naming
    _saving_lib._serialize_model_as_json = around(_saving_lib._serialize_model_as_json, after=keras_files.with_more)
    _saving_lib._load_model_from_dir = keras_files.reader("_load_model_from_dir")
    _saving_lib._load_model_from_fileobj = keras_files.reader("_load_model_from_fileobj")


_used = False


def install_on_first_use() -> None:
    """Makes the changes that concern training, once. A program that uses nothing of keras_mp never gets them."""
    global _used
    if _used:
        return
    _used = True
    tf.errors.UnknownError.__new__ = staticmethod(graph_errors.unknown_error_or_its_cause)
    trainer = next(cls for cls in keras.Model.__mro__ if "compile" in vars(cls))
    trainer.compile = around(trainer.compile, after=keras_hooks.after_compile)
    maker = next(cls for cls in keras.Model.__mro__ if "make_train_function" in vars(cls))
    maker.make_train_function = around(maker.make_train_function, before=keras_hooks.before_making_a_step)
    callbacks = keras.callbacks.CallbackList
    callbacks.on_train_begin = around(callbacks.on_train_begin, before=keras_hooks.before_training)
    callbacks.on_epoch_end = around(callbacks.on_epoch_end, after=keras_hooks.after_epoch)
