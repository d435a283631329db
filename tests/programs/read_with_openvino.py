"""Reads SavedModels with OpenVINO: `python openvino_program.py JOB.json`. There is no TensorFlow in this process."""

import json
import sys

for name in ("tensorflow", "keras", "keras_mp"):
    sys.modules[name] = None

import numpy as np  # noqa: E402
import openvino  # noqa: E402

core = openvino.Core()
with open(sys.argv[1]) as file:
    job = json.load(file)
for each in job:
    # OpenVINO would round products to bfloat16 on CPUs that are fast at it; the graph says where to round.
    model = core.compile_model(each["path"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with np.load(each["inputs"]) as arrays:
        names, _, *values = (arrays[key] for key in arrays.files)
    answers = model(dict(zip(map(str, names), values, strict=True)))
    np.savez(each["outputs"], **{port.get_any_name(): value for port, value in answers.items()})
assert "tensorflow" not in {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
