"""SavedModels for serving: float32 in and out, versioned, measured, and verified without Keras."""

from keras_mp.export.comparison import OutputReport
from keras_mp.export.verification import ExportReport, verify_export
from keras_mp.export.writing import export

__all__ = ["ExportReport", "OutputReport", "export", "verify_export"]
