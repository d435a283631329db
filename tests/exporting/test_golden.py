"""Exports of earlier versions go on loading, and return the same; see tests/golden/make_export.py and make_v0_2.py."""

import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from tests.golden import make_v0_2
from tests.golden.make_export import FOLDER, ROWS

# The scores when it was written, on an x86-64 CPU.
SCORES = np.array(
    [
        [-0.449219, -0.259766, 0.753906],
        [-0.957031, -0.158203, 2.203125],
    ],
    "float32",
)


def test_the_golden_export_is_read_and_returns_the_same():
    path = FOLDER / "1"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size < 100_000
    report = keras_mp.verify_export(path)
    assert report.record["format"] == 1
    assert {name: each.dtype for name, each in report.outputs.items()} == {"scores": "float32", "best": "int32"}
    # Another CPU may sum the matmuls in bfloat16 in another order.
    np.testing.assert_allclose(report.answers["scores"], SCORES, rtol=0, atol=2e-2 * np.abs(SCORES).max())
    np.testing.assert_array_equal(report.answers["best"], SCORES.argmax(-1))
    assert sorted(ROWS) == sorted(each["name"] for each in report.record["signatures"]["serving_default"]["inputs"])


@pytest.mark.parametrize("name", make_v0_2.EXPORTED)
def test_exports_of_the_build_before_the_modules_moved_return_the_same(name):
    path = make_v0_2.FOLDER / "exports" / name / "1"
    keras_mp.verify_export(path)
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    (inputs,) = signature.structured_input_signature[1]
    outputs = signature(**{inputs: tf.constant(make_v0_2.inputs(name))})
    wanted = np.load(make_v0_2.FOLDER / f"{name}.npz").values()
    for ours, theirs in zip([outputs[each] for each in sorted(outputs)], wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.03 * np.abs(theirs).max())
