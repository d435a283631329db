"""Keras's model files. Each test fails with the private name in its docstring when that moves."""

import json
import logging
import pickle

import h5py
import keras
import numpy as np
import pytest

import keras_mp
from keras_mp._compat import keras_files


def test_saving_to_h5_is_told(tmp_path):
    """Rests on `keras.src.saving.keras_saveable` setting `use_legacy_config` while it writes HDF5."""
    seen = []

    @keras.saving.register_keras_serializable(package="tests")
    class Telling(keras.layers.Layer):
        def get_config(self):
            seen.append(keras_files.saving_to_h5())
            return super().get_config()

    model = keras.Sequential([keras.Input((2,)), Telling()])
    model.save(tmp_path / "model.keras")
    assert not any(seen)
    seen.clear()
    logging.disable(logging.WARNING)  # that the format is old
    model.save(tmp_path / "model.h5")
    logging.disable(logging.NOTSET)
    assert any(seen)


def test_weights_are_filed_as_those_of_another_class(tmp_path):
    """Rests on `naming.to_snake_case` as `saving_lib` calls it, and on the names of its caller's local variables."""
    x = keras.Input((2,))
    model = keras.Model(x, [keras.layers.Dense(1)(x), keras_mp.layers.Head(1)(x), keras.layers.Dense(1)(x)])
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        assert set(file["layers"]) == {"input_layer", "dense", "dense_1", "dense_2"}


def test_layers_by_address_are_those_of_the_file(tmp_path):
    """Rests on `_walk_saveable` of Keras's `saving_lib`, on its `KerasSaveable` and on `naming.to_snake_case`."""
    x = keras.Input((3, 2))
    y = keras.layers.Bidirectional(keras.layers.LSTM(2, return_sequences=True))(x)
    model = keras.Model(x, keras.Sequential([keras.layers.Dense(2), keras_mp.layers.Head(1)])(y))
    model.save_weights(tmp_path / "model.weights.h5")
    filed = []
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visit(lambda name: filed.append(f"/{name}") if not name.rpartition("/")[2].isdigit() else None)
    assert {name for name in filed if f"{name}/vars" in filed} == keras_files.layers_by_address(model).keys() - {""}


def test_what_is_written_into_files_and_reads_them(tmp_path, monkeypatch):
    """Rests on `_serialize_model_as_json`, `_load_model_from_fileobj` and `_load_model_from_dir` of `saving_lib`."""
    for name in ("_more", "_readers"):
        monkeypatch.setattr(keras_files, name, dict(getattr(keras_files, name)))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="this")
    model.save(tmp_path / "plain.keras")
    keras_files.write_into_model_files("more", lambda model: {"name": model.name})
    keras_files.read_model_files_by("more", lambda source, *args, **kw: ("read", (*args, *kw.values())))
    model.save(tmp_path / "model.keras")
    keras.saving.save_model(model, tmp_path / "folder", zipped=False)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["more"] == {"name": "this"}
    for name in ("model.keras", "folder"):
        assert keras.saving.load_model(tmp_path / name, safe_mode=False) == ("read", (None, True, False))
    assert pickle.loads(pickle.dumps(model)) == ("read", (None, True, False))
    assert keras.saving.load_model(tmp_path / "plain.keras").name == "this"
    with (tmp_path / "model.keras").open("rb") as file:
        np.testing.assert_array_equal(
            keras_files.load_with_keras(file, None, False, True).get_weights()[0], model.get_weights()[0]
        )


def test_load_with_keras_makes_a_model_of_another_configuration(tmp_path):
    """Rests on `_model_from_config` of Keras's `saving_lib`."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)], name="this")
    keras.saving.save_model(model, tmp_path / "folder", zipped=False)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["config"]["name"] = "that"
    assert keras_files.load_with_keras(tmp_path / "folder", None, False, True, config=config).name == "that"


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`:UserWarning")
def test_trusting_reaches_what_keras_makes_inside():
    """Rests on `SafeModeScope` and `in_safe_mode` of Keras's `serialization_lib`."""
    config = keras.saving.serialize_keras_object(lambda x: x)
    with keras_files.trusting(False):
        assert keras.saving.deserialize_keras_object(config)(3) == 3
    with keras_files.trusting(True), pytest.raises(ValueError, match="safe_mode"):
        keras.saving.deserialize_keras_object(config, safe_mode=False)
