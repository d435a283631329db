"""Mixed-precision training for TensorFlow and Keras 3 that is fast, safe and provable."""

import pathlib as _pathlib
import sys as _sys

# ruff: noqa: E402

# The command's own code is imported after this package, so after TensorFlow, which writes its banner on import.
_program = _pathlib.PurePath(*_sys.argv[:1]).stem
if _program == "keras-mp" or (_program == "-m" and "keras_mp" in _sys.orig_argv):
    from keras_mp.cli import quiet as _quiet  # isort: skip

    _quiet.start()

from keras_mp import _compat  # noqa: F401  # isort: skip  (first: explains a missing TensorFlow)
from keras_mp import activations, diagnostics, errors, hardware, layers, losses
from keras_mp.conversion.convert import convert
from keras_mp.conversion.load_model import load_model
from keras_mp.diagnostics import PrecisionMonitor, compare, diagnose, locate_nonfinite
from keras_mp.distribution.strategies import strategy
from keras_mp.exporting.export import export
from keras_mp.exporting.verification import ExportReport, verify_export
from keras_mp.hardware import Hardware, detect
from keras_mp.optimizers.loss_scale_optimizer import LossScaleOptimizer
from keras_mp.policies.policy import needs_loss_scaling, policy_scope, preprocessing_scope, set_policy
from keras_mp.policies.policy_map import PolicyMap
from keras_mp.training.model import Model
from keras_mp.tuning.report import Tuning
from keras_mp.tuning.search import tune

__version__ = "0.2.0"

__all__ = [
    "ExportReport",
    "Hardware",
    "LossScaleOptimizer",
    "Model",
    "PolicyMap",
    "PrecisionMonitor",
    "Tuning",
    "activations",
    "compare",
    "convert",
    "detect",
    "diagnose",
    "diagnostics",
    "errors",
    "export",
    "hardware",
    "layers",
    "load_model",
    "locate_nonfinite",
    "losses",
    "needs_loss_scaling",
    "policy_scope",
    "preprocessing_scope",
    "set_policy",
    "strategy",
    "tune",
    "verify_export",
]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
