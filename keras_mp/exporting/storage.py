"""What an export computes in, and what it stores its weights in."""

import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware, layers
from keras_mp._compat import keras_layers, keras_models
from keras_mp.conversion.clone import Choice, Rebuild
from keras_mp.conversion.convert import convert
from keras_mp.errors import ConversionError, ExportError, KerasMPWarning
from keras_mp.policies.policy import compute_dtypes, stacklevel

__all__ = [
    "Storage",
    "far_beyond",
    "half_of",
    "holds",
    "narrow_dtypes",
    "resources_of",
    "tolerance_of",
    "with_precision",
]

PRECISIONS = ("auto", "float32", "mixed")
WEIGHTS = ("float32", "half", "float16", "bfloat16")

# Largest difference between model and export, relative to the largest output, that rounding in the narrowest dtype can
# explain where TensorFlow fuses ops in one of them and not in the other: a few units in the last place.
_TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
# Beyond this it is a fault and no rounding. In float32 fused products and sums in another order add up over layers.
_FAR = {"float64": 1e-9, "float32": 1e-3, "float16": 5e-2, "bfloat16": 0.25}
# What rounding to nearest costs at most, relative to a number that the dtype holds in full precision.
_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def narrow_dtypes(model: keras.Model) -> frozenset[str]:
    """The 16-bit dtypes that a model computes in.

    Args:
        model: a Keras model.

    Example:

    >>> import keras
    >>> sorted(narrow_dtypes(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, dtype="mixed_bfloat16")])))
    ['bfloat16']
    """
    return compute_dtypes(model) & {"float16", "bfloat16"}


def tolerance_of(dtypes: "set[str] | frozenset[str]") -> float:
    """The largest error, relative to the largest output, that rounding in any of some dtypes explains.

    Args:
        dtypes: those that a model and its export compute in and store weights in.

    Example:

    >>> tolerance_of({"float32", "float16"})
    0.01
    """
    return max((_TOLERANCE.get(dtype, 1e-5) for dtype in dtypes), default=1e-5)


def far_beyond(dtypes: "set[str] | frozenset[str]") -> float:
    """The error, relative to the largest output, from which on it is no rounding in any of some dtypes.

    Args:
        dtypes: those that a model and its export compute in and store weights in.

    Example:

    >>> far_beyond({"float32", "float16"})
    0.05
    """
    return max((_FAR.get(dtype, 1e-3) for dtype in dtypes), default=1e-3)


def holds(value: np.ndarray, dtype: str) -> bool:
    """Whether a 16-bit dtype holds a weight to the precision that it has, wherever its entries are used together.

    A finite entry must stay finite. In each slice along each axis, which are the weights of one input or one output,
    the error must be rounding of the largest entry: a slice of none but tiny entries would become 0 or lose its digits,
    and what multiplies it may be large. A tiny entry beside large ones may go.

    Args:
        value: the weight in float32.
        dtype: "float16" or "bfloat16".

    Example:

    >>> holds(np.array([[1.0, 1e-9]], "float32"), "float16"), holds(np.array([[1.0], [1e-9]], "float32"), "float16")
    (False, False)
    >>> holds(np.array([[1.0, 1e-9], [1.0, 1.0]], "float32"), "float16")
    True
    """
    finite = np.isfinite(value)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = value.astype(tf.as_dtype(dtype).as_numpy_dtype).astype(np.float32)
        if not np.isfinite(rounded[finite]).all():
            return False
        error = np.where(finite, np.abs(rounded - value), 0)
    size = np.where(finite, np.abs(value), 0)
    size[size < np.finfo(np.float32).tiny] = 0  # TensorFlow computes with 0 for these
    error[size == 0] = 0
    for axis in range(value.ndim):
        others = tuple(each for each in range(value.ndim) if each != axis)
        if (error.max(others, initial=0) > 2 * _ROUNDOFF[dtype] * size.max(others, initial=0)).any():
            return False
    return True


def with_precision(model: keras.Model, precision: str) -> keras.Model:
    """The model itself, or its twin that computes in float32, without what TensorFlow Serving refuses.

    Keras has XLA compile convolutions in groups. Where each channel is a group, `keras_mp.layers.Conv1D` and `Conv2D`
    take their place.

    Args:
        model: a Keras model.
        precision: "float32"; "mixed" for the dtypes that it was trained in; or "auto", which is "mixed" where the
            hardware here multiplies faster in them, and "float32" elsewhere.

    Raises:
        ExportError: for another precision.
        ConversionError: for "float32" and a model that cannot be converted to it.

    Warns:
        KerasMPWarning: for float16 products on a CPU, and "mixed" for a model that has none.
    """
    if precision not in PRECISIONS:
        raise ExportError(
            f"Unknown precision {precision!r}. Type precision='float32', 'mixed' (as trained) or 'auto' (by the "
            "hardware here)."
        )
    return _without_groups(_in_precision(model, precision))


def _without_groups(model: keras.Model) -> keras.Model:
    ours = {keras.layers.Conv1D: layers.Conv1D, keras.layers.Conv2D: layers.Conv2D}

    def is_depthwise(layer: keras.Layer) -> bool:
        return type(layer) in ours and layer.groups > 1 and layer.kernel.shape[-2] == 1

    def choose(layer: keras.Layer, path: str) -> Choice:
        return Choice(ours[type(layer)] if is_depthwise(layer) else type(layer), layer.dtype_policy)

    if not any(map(is_depthwise, keras_layers.layers_by_path(model).values())):
        return model
    return Rebuild(choose)(model)


def _in_precision(model: keras.Model, precision: str) -> keras.Model:
    narrow = narrow_dtypes(model)
    if not narrow:
        if precision == "mixed":
            _warn(
                f"precision='mixed': model {model.name!r} computes in no 16-bit dtype, so its export does not either. "
                "Type keras_mp.convert(model, 'mixed_bfloat16') first, or precision='float32'."
            )
        return model
    here = hardware.detect()
    if precision == "mixed" or (precision == "auto" and narrow <= here.fast_dtypes):
        if "float16" in narrow and not here.accelerators:
            _warn(
                "This export multiplies in float16, and a CPU may run TensorFlow's fused float16 product a thousand "
                "times slower than float32. Serve it on a GPU, or type precision='float32'."
            )
        return model
    try:
        return convert(model, "float32")
    except ConversionError as error:
        if precision == "float32":
            raise
        _warn(f"The export computes as trained, not in float32, for the model cannot be converted: {error}")
        return model


def half_of(weights: str, model: keras.Model) -> str | None:
    """The dtype that weights are stored in for an argument `weights`; None for as they are.

    Args:
        weights: "float32"; "float16" or "bfloat16"; or "half" for the one that the model was trained in, float16 where
            it was trained in none, which has three bits more.
        model: the model as it was trained.

    Raises:
        ExportError: for anything else.
    """
    if weights not in WEIGHTS:
        raise ExportError(
            f"Unknown weights {weights!r}. Type weights='float32', or for half the size 'half', 'float16' or "
            "'bfloat16'."
        )
    if weights == "float32":
        return None
    if weights != "half":
        return weights
    return "bfloat16" if narrow_dtypes(model) == {"bfloat16"} else "float16"


class Storage:
    """The variables of an export, each held once however many signatures read it.

    Args:
        half: the dtype for float32 variables with two axes or more, or None to hold them as they are. Vectors, such as
            biases and statistics, are small and stay in float32, and so does what the dtype does not hold.

    Attributes:
        kept: paths of the variables that were left in float32 because the dtype does not hold their values.
    """

    def __init__(self, half: str | None) -> None:
        self.half = half
        self.kept: list[str] = []
        self._held: dict[int, tuple[keras.Variable, tf.Variable]] = {}

    @property
    def variables(self) -> list[tf.Variable]:
        """What there is to write."""
        return [held for _, held in self._held.values()]

    @property
    def paths(self) -> list[str]:
        """The paths of the variables, in the same order."""
        return [variable.path for variable, _ in self._held.values()]

    def forward(self, computing: keras.Model, trained: keras.Model) -> Any:
        """A function like the model, of its inputs, that reads these variables instead of the model's.

        They are cast when it is called. Cast when a file is loaded, OpenVINO and tf2onnx would not know them.

        Args:
            computing: the model, or its twin in another precision.
            trained: the model that was trained, whose values are stored.
        """
        owners = dict(zip(map(id, _variables(computing)), _variables(trained), strict=False))
        if [v.shape for v in _variables(computing)] != [v.shape for v in _variables(trained)]:
            owners = {id(variable): variable for variable in _variables(computing)}

        def values(variables: list[keras.Variable]) -> list[tf.Tensor]:
            return [tf.cast(self._hold(owners[id(each)]), each.dtype) for each in variables]

        for variable in _variables(computing):
            self._hold(owners[id(variable)])  # now, for a variable cannot be made while a graph is traced

        def call(inputs: Any) -> Any:
            trainable = values(computing.trainable_variables)
            rest = values(computing.non_trainable_variables)
            with keras_models.without_remat(computing):
                return computing.stateless_call(trainable, rest, inputs, training=False)[0]

        return call

    def _hold(self, variable: keras.Variable) -> tf.Variable:
        if id(variable) not in self._held:
            # Not the model's own: one of a strategy's has a copy on each replica, and a checkpoint all its names.
            value = tf.convert_to_tensor(variable.value)
            self._held[id(variable)] = (variable, tf.Variable(self._stored(variable, value), trainable=False))
        return self._held[id(variable)][1]

    def _stored(self, variable: keras.Variable, value: tf.Tensor) -> tf.Tensor:
        if self.half is None or value.dtype != tf.float32 or value.shape.rank < 2:
            return value
        if not holds(value.numpy(), self.half):
            self.kept.append(variable.path)
            return value
        return tf.cast(value, self.half)


def resources_of(models: list[keras.Model]) -> list[Any]:
    """Tables and variables that layers hold besides their Keras variables, which a SavedModel has to be told of.

    Args:
        models: Keras models.
    """
    found: dict[int, Any] = {}
    kinds = (tf.saved_model.experimental.TrackableResource, tf.Variable, tf.Module)

    def visit(value: Any) -> None:
        if isinstance(value, kinds):
            found[id(value)] = value
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    for model in models:
        for layer in keras_layers.layers_by_path(model).values():
            for value in vars(layer).values():
                visit(value)
    return list(found.values())


def _variables(model: keras.Model) -> list[keras.Variable]:
    return [*model.trainable_variables, *model.non_trainable_variables]


def _warn(message: str) -> None:
    warnings.warn(message, KerasMPWarning, stacklevel=stacklevel())
