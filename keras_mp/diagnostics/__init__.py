"""Tools that show what half precision does to a model. They read and never change a number."""

from keras_mp.diagnostics.comparison import Comparison, LayerComparison, compare
from keras_mp.diagnostics.diagnosis import Diagnosis, TensorDiagnosis, diagnose
from keras_mp.diagnostics.location import Location, Magnitude, locate_nonfinite
from keras_mp.diagnostics.monitor import Observation, PrecisionMonitor, TensorHealth

__all__ = [
    "Comparison",
    "Diagnosis",
    "LayerComparison",
    "Location",
    "Magnitude",
    "Observation",
    "PrecisionMonitor",
    "TensorDiagnosis",
    "TensorHealth",
    "compare",
    "diagnose",
    "locate_nonfinite",
]
