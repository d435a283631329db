"""Every exception that keras_mp raises on purpose.

```
KerasMPError
├── MissingTensorFlowError (ImportError)   TensorFlow is not installed, or Keras runs on another backend
├── PolicyError (ValueError)               a dtype policy that does not exist
├── ArgumentError (ValueError)             an argument that no optimizer, layer or function here can work with
├── ConversionError (ValueError)           a model that cannot be converted to another dtype policy
├── DistributionError (ValueError)         a strategy, cluster or batch that replicas cannot work with
├── WorkerLostError (RuntimeError)         another worker of a multi-worker job does not answer any more
├── CompilationError (RuntimeError)        XLA cannot compile a layer
├── LossScaleStuckError (RuntimeError)     too many steps in a row were skipped
└── ExportError (ValueError)               a model cannot be written there, or what was written is not the model
    └── ExportWriteError (OSError)         the disk is full, or the folder cannot be written to
```

Each is also the built-in exception that Keras raises in the like case, so that code written for Keras catches it. Each
message says what was given, what was expected, and what to type instead. Besides these there is one warning,
`KerasMPWarning`, for what works but is not what the user is likely to want.
"""

__all__ = [
    "ArgumentError",
    "CompilationError",
    "ConversionError",
    "DistributionError",
    "ExportError",
    "ExportWriteError",
    "KerasMPError",
    "KerasMPWarning",
    "LossScaleStuckError",
    "MissingTensorFlowError",
    "PolicyError",
    "WorkerLostError",
]


class KerasMPError(Exception):
    """Base class of all the errors that keras_mp raises on purpose."""

    # Raised while TensorFlow traces a user's function, an error of a class that TensorFlow does not know would reach
    # the user as its `StagingError`. With this attribute it lets them through as they are.
    ag_pass_through = True


class MissingTensorFlowError(KerasMPError, ImportError):
    """TensorFlow is not installed, is too old, or Keras runs on another backend."""


class PolicyError(KerasMPError, ValueError):
    """A dtype policy that does not exist."""


class ArgumentError(KerasMPError, ValueError):
    """An argument that no optimizer, layer or function here can work with."""


class ConversionError(KerasMPError, ValueError):
    """A model cannot be converted to another dtype policy."""


class DistributionError(KerasMPError, ValueError):
    """A strategy, a cluster or a batch that replicas cannot work with."""


class WorkerLostError(KerasMPError, RuntimeError):
    """Another worker of a multi-worker job does not answer any more."""


class CompilationError(KerasMPError, RuntimeError):
    """XLA cannot compile a layer of a model."""


class LossScaleStuckError(KerasMPError, RuntimeError):
    """Too many training steps in a row were skipped for non-finite gradients."""


class ExportError(KerasMPError, ValueError):
    """A model cannot be written where it was asked for, or what was written does not equal the model."""


class ExportWriteError(ExportError, OSError):
    """A model could not be written: the disk is full, or the folder cannot be written to. Nothing was published."""


class KerasMPWarning(UserWarning):
    """Something works, but is not what the user is likely to want."""
