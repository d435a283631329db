"""Files of the build before the modules moved go on loading, and compute the same; see tests/golden/make_v0_2.py."""

import json
import re
import warnings
import zipfile

import keras
import numpy as np
import pytest

import keras_mp
from tests.golden import make_v0_2 as golden

LOADERS = [keras_mp.load_model, keras.saving.load_model]
# A subclass stands in files under its own name: golden>Trained.
NEVER_IN_A_FILE = {"Model"}


def assert_same_outputs(model, name):
    wanted = np.load(golden.FOLDER / f"{name}.npz").values()
    for ours, theirs in zip(golden.flat(model.predict(golden.inputs(name), verbose=0)), wanted, strict=True):
        # Another CPU may add up in another order before it rounds to bfloat16.
        np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())


def names_in(path):
    """The registered names in the JSON of a `.keras` file."""
    with zipfile.ZipFile(path) as file:
        texts = [file.read(each).decode() for each in file.namelist() if each.endswith(".json")]
    return set(re.findall(r"keras_mp>(\w+)", " ".join(texts)))


def test_the_registered_names_stay():
    was = json.loads((golden.FOLDER / "registered.json").read_text())
    now = golden.registered()
    assert set(was) - set(now) == set(), "files hold these names, so they must not change"
    assert set(now) - set(was) == set(), "write a new folder of golden files, which hold the new names"


def test_every_registered_name_is_in_a_file():
    found = set().union(*(names_in(golden.FOLDER / f"{name}.keras") for name in golden.MODELS))
    assert set(golden.registered()) - found == NEVER_IN_A_FILE


@pytest.mark.filterwarnings("ignore:.*computes in float16, and:keras_mp.errors.KerasMPWarning")
@pytest.mark.parametrize("name", golden.MODELS)
def test_files_of_the_build_before_load(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # which is how Keras says that it left something out
        loaded = [load(golden.FOLDER / f"{name}.keras") for load in LOADERS]
    for model in loaded:
        assert_same_outputs(model, name)
        if golden.MODELS[name][-1] is not None:
            assert type(model.optimizer) is keras_mp.LossScaleOptimizer
            assert int(model.optimizer.iterations) == 3


@pytest.mark.parametrize("name", golden.MODELS)
def test_weights_of_the_build_before_load(name):
    model = golden.make(name)
    model.load_weights(golden.FOLDER / f"{name}.weights.h5")
    assert_same_outputs(model, name)
