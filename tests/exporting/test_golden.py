"""An export of an earlier version goes on loading and answering the same; see tests/golden/make_export.py."""

import numpy as np

import keras_mp
from tests.golden.make_export import FOLDER, ROWS

# What it answered when it was written, on an x86-64 CPU.
SCORES = np.array(
    [
        [-0.449219, -0.259766, 0.753906],
        [-0.957031, -0.158203, 2.203125],
    ],
    "float32",
)


def test_the_golden_export_is_read_and_answers_the_same():
    path = FOLDER / "1"
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size < 100_000
    report = keras_mp.verify_export(path)
    assert report.record["format"] == 1
    assert {name: each.dtype for name, each in report.outputs.items()} == {"scores": "float32", "best": "int32"}
    # Products in bfloat16 may be summed in another order on another CPU.
    np.testing.assert_allclose(report.answers["scores"], SCORES, rtol=0, atol=2e-2 * np.abs(SCORES).max())
    np.testing.assert_array_equal(report.answers["best"], SCORES.argmax(-1))
    assert sorted(ROWS) == sorted(each["name"] for each in report.record["signatures"]["serving_default"]["inputs"])
