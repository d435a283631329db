"""Converts SavedModels by tf2onnx's command and runs the files in onnxruntime: `python onnx_program.py JOB.json`."""

import json
import sys

import numpy as np
import onnxruntime
from tf2onnx import convert

with open(sys.argv[1]) as file:
    job = json.load(file)
for each in job:
    onnx = each["scratch"] + ".onnx"
    arguments = ["--saved-model", each["path"], "--output", onnx, "--opset", "18"]
    sys.argv[1:] = [*arguments, "--tag", "serve", "--signature_def", "serving_default"]
    convert.main()
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    with np.load(each["inputs"]) as arrays:
        names, _, *values = (arrays[key] for key in arrays.files)
    outputs = [output.name for output in session.get_outputs()]
    answers = session.run(outputs, dict(zip(map(str, names), values, strict=True)))
    np.savez(each["outputs"], **dict(zip(outputs, answers, strict=True)))
