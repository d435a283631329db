"""Mixed-precision training for TensorFlow and Keras 3 that is fast, safe and provable."""

from keras_mp import backend as _backend  # noqa: F401  # isort: skip  (first: explains a missing TensorFlow)
from keras_mp import activations, errors, layers, losses
from keras_mp.convert import convert
from keras_mp.distribution import strategy
from keras_mp.export import ExportReport, export, verify_export
from keras_mp.hardware import Hardware, detect
from keras_mp.loading import load_model
from keras_mp.optimizer import LossScaleOptimizer
from keras_mp.policy import needs_loss_scaling, policy_scope, preprocessing_scope, set_policy
from keras_mp.policy_map import PolicyMap
from keras_mp.training import Model
from keras_mp.tune import Tuning, tune

__all__ = [
    "ExportReport",
    "Hardware",
    "LossScaleOptimizer",
    "Model",
    "PolicyMap",
    "Tuning",
    "activations",
    "convert",
    "detect",
    "errors",
    "export",
    "layers",
    "load_model",
    "losses",
    "needs_loss_scaling",
    "policy_scope",
    "preprocessing_scope",
    "set_policy",
    "strategy",
    "tune",
    "verify_export",
]
