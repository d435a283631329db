"""Every exception that keras_mp raises on purpose.

```
KerasMPError
├── MissingTensorFlowError (ImportError)   TensorFlow is not installed, or Keras runs on another backend
├── PolicyError (ValueError)               a dtype policy that does not exist
├── ArgumentError (ValueError)             an argument that an optimizer, layer or function cannot use
├── ConversionError (ValueError)           a model that cannot be converted to another dtype policy
├── DistributionError (ValueError)         a strategy, cluster or batch that replicas cannot use
├── WorkerLostError (RuntimeError)         another worker of a multi-worker job no longer responds
├── CompilationError (RuntimeError)        XLA cannot compile a layer
├── LossScaleStuckError (RuntimeError)     too many steps in a row were skipped
└── ExportError (ValueError)               a model cannot be exported, or its export does not equal the model
    └── ExportWriteError (OSError)         the disk is full, or the folder cannot be written to
```

Each is also the built-in exception that Keras raises in such a case, so code written for Keras catches it. Each message
says what was given, what was expected, and what to type instead. There is one warning, `KerasMPWarning`. It is for code
that works but probably not as the user wants.

The layers, losses, activations and optimizer that stand in for Keras's raise Keras's own errors for wrong shapes and
arguments.
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

    # While TensorFlow traces a user's function, it turns an unknown error class into its `StagingError`. This attribute
    # prevents that.
    ag_pass_through = True


class MissingTensorFlowError(KerasMPError, ImportError):
    """TensorFlow is not installed, is too old, or Keras runs on another backend."""


class PolicyError(KerasMPError, ValueError):
    """A dtype policy that does not exist."""


class ArgumentError(KerasMPError, ValueError):
    """An argument that an optimizer, layer or function cannot use."""


class ConversionError(KerasMPError, ValueError):
    """A model cannot be converted to another dtype policy."""


class DistributionError(KerasMPError, ValueError):
    """A strategy, cluster or batch that replicas cannot use."""


class WorkerLostError(KerasMPError, RuntimeError):
    """Another worker of a multi-worker job no longer responds."""


class CompilationError(KerasMPError, RuntimeError):
    """XLA cannot compile a layer of a model."""


class LossScaleStuckError(KerasMPError, RuntimeError):
    """Too many training steps in a row were skipped for non-finite gradients."""


class ExportError(KerasMPError, ValueError):
    """A model cannot be exported, or its export does not equal the model."""


class ExportWriteError(ExportError, OSError):
    """A model could not be written: the disk is full, or the folder cannot be written to. Nothing was published."""


class KerasMPWarning(UserWarning):
    """Some code works, but probably not as the user wants."""
