"""Mixed-precision training for TensorFlow and Keras 3 that is fast, safe and provable."""

from keras_mp import _compat  # noqa: F401  # isort: skip  (first: explains a missing TensorFlow)
from keras_mp import activations, errors, layers, losses
from keras_mp.conversion.convert import convert
from keras_mp.conversion.load_model import load_model
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
