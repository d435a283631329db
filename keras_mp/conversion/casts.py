"""The casts that `convert` inserts into a model: of outputs, of losses, and around operations that need float32.

A conversion back to float32 takes them out again. The classes that can stand in a model's configuration are registered
with Keras, so that they come back from a file.
"""

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers
from keras_mp.errors import ConversionError
from keras_mp.training.penalties import NARROW, is_narrow

__all__ = [
    "Float32Operation",
    "OutputCast",
    "UncastInputs",
    "cast_losses",
    "cast_outputs",
    "casts_losses",
    "float32_operation",
    "inserted_attributes",
    "output_cast",
]


@keras.saving.register_keras_serializable(package="keras_mp")
class OutputCast(keras.layers.Layer):
    """Casts a 16-bit output of a model to float32, where the layer that makes it cannot return float32 itself.

    Args:
        **kwargs: `name` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape and dtype.

    Returns:
        Tensor of that shape, float32 where the input is a 16-bit float.

    Example:

    >>> import keras_mp
    >>> OutputCast()(tf.ones((2,), "bfloat16")).dtype
    tf.float32
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"}, autocast=False)
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        """Casts; see the class."""
        return keras.ops.cast(inputs, "float32") if is_narrow(inputs) else inputs

    def compute_output_spec(self, inputs: Any) -> Any:
        """The output as a symbolic tensor."""
        return keras.KerasTensor(inputs.shape, "float32" if is_narrow(inputs) else inputs.dtype)


@keras.saving.register_keras_serializable(package="keras_mp")
class UncastInputs(keras.dtype_policies.DTypePolicy):
    """A dtype policy under which a layer hands its float32 inputs on as they are.

    For a layer that holds others, when ids, times or positions are among its inputs: the layers inside cast what they
    compute with at their own doors. Everything else is as under the policy of that name.

    Args:
        name: the name of a dtype policy, such as "mixed_bfloat16".

    Example:

    >>> import keras_mp
    >>> UncastInputs("mixed_bfloat16").convert_input(tf.constant(4099.0), True, "bfloat16")
    <tf.Tensor: shape=(), dtype=float32, numpy=4099.0>
    """

    def convert_input(self, x: Any, autocast: bool, dtype: Any) -> Any:
        """Converts an input to a tensor: 16-bit floats to `dtype`, all others to float32."""
        return super().convert_input(x, autocast, dtype if is_narrow(x) else "float32")


# Operations that sum, divide, exponentiate or compare, as in torch.amp's list of float32 operations. The first return
# fewer numbers than they get, so a cast back gains nothing. The second may leave the range of float16.
_REDUCTIONS = frozenset(
    [
        "Sum", "Mean", "Var", "Std", "Norm", "Logsumexp", "Prod", "Moments", "Nansum", "Nanmean", "Nanvar",
        "Nanstd", "Nanprod", "Median", "Nanmedian", "Quantile", "Nanquantile", "Percentile", "Nanpercentile",
        "Average", "Trace", "Trapezoid", "Vdot", "Logdet", "Det", "Slogdet", "Bincount", "CountNonzero",
        "Corrcoef", "SegmentReduction", "BinaryCrossentropy", "CategoricalCrossentropy",
        "SparseCategoricalCrossentropy", "CTCLoss", "PSNR", "SSIM",
    ]
)  # fmt: skip
_GROWING = frozenset(
    [
        "Exp", "Exp2", "Expm1", "Power", "Square", "Cumsum", "Cumprod", "Nancumsum", "Nancumprod", "Cosh",
        "Sinh", "Tan", "Reciprocal", "Divide", "TrueDivide", "DivideNoNan", "Rsqrt", "Logaddexp",
        "Logaddexp2", "Diff", "Vander", "CDist", "Hypot", "FloorDivide",
    ]
)  # fmt: skip
_OTHERS = frozenset(
    [
        "Log", "Log10", "Log1p", "Log2", "LogSigmoid", "Softplus", "Softmax", "LogSoftmax", "Sparsemax",
        "Squareplus", "Normalize", "LayerNorm", "RMSNorm", "BatchNorm", "Arccos", "Arcsin", "Arccosh",
        "Arcsinh", "Arctanh", "Erfinv", "Sqrt", "Cbrt", "Mod", "Fmod", "Floor", "Ceil", "Round", "Sin", "Cos",
        "Sinc", "Argmax", "Argmin", "Argsort", "TopK", "InTopK", "Sort", "Argpartition", "SearchSorted",
        "Digitize", "Histogram", "Equal", "NotEqual", "Greater", "GreaterEqual", "Less", "LessEqual",
        "Isclose", "AllClose", "Nanargmax", "Nanargmin", "Unique", "AveragePool", "AdaptiveAveragePool",
        "Inv", "Solve", "SolveTriangular", "Cholesky", "CholeskyInverse", "Eig", "Eigh", "Lstsq", "LuFactor",
        "Pinv", "Qr", "SVD", "MatrixRank",
    ]
)  # fmt: skip


@keras.saving.register_keras_serializable(package="keras_mp")
class Float32Operation(keras.Operation):
    """Runs an operation of a Functional model's graph in float32.

    Args:
        operation: a `keras.Operation`, such as the one behind `keras.ops.sum(x)` of a symbolic tensor `x`.
        casts_back: whether its float outputs are cast to the dtype of its 16-bit inputs.
        name: the operation's name.

    Call arguments:
        *args, **kwargs: the arguments of the operation. 16-bit floats among them are cast to float32.

    Returns:
        The operation's outputs.

    Example:

    >>> import keras
    >>> sums = keras.Model(x := keras.Input((4096,), dtype="float16"), keras.ops.sum(x, -1)).operations[-1]
    >>> Float32Operation(sums)(tf.fill((1, 4096), tf.constant(20, "float16")))
    <tf.Tensor: shape=(1,), dtype=float32, numpy=array([81920.], dtype=float32)>
    """

    def __init__(self, operation: keras.Operation, casts_back: bool = False, name: str | None = None) -> None:
        super().__init__(name=name)
        self.operation, self.casts_back = operation, casts_back

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Computes; see the class."""
        wide = keras.tree.map_structure(lambda x: keras.ops.cast(x, "float32") if is_narrow(x) else x, (args, kwargs))
        outputs = self.operation(*wide[0], **wide[1])
        back = self._dtype_behind(args, kwargs)
        return outputs if back is None else keras.tree.map_structure(lambda y: _to_float(y, back), outputs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs as symbolic tensors."""

        def of(x: Any, dtype: str) -> Any:
            return keras.KerasTensor(x.shape, dtype) if isinstance(x, keras.KerasTensor) else x

        wide = keras.tree.map_structure(lambda x: of(x, "float32") if is_narrow(x) else x, (args, kwargs))
        outputs = self.operation.compute_output_spec(*wide[0], **wide[1])
        back = self._dtype_behind(args, kwargs)
        if back is None:
            return outputs
        return keras.tree.map_structure(lambda y: of(y, back) if _is_float(y) else y, outputs)

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal operation."""
        operation = keras.saving.serialize_keras_object(self.operation)
        return {"operation": operation, "casts_back": self.casts_back, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Float32Operation":
        """Makes an operation from what `get_config` returned.

        Args:
            config: the configuration.
        """
        return cls(**{**config, "operation": keras.saving.deserialize_keras_object(config["operation"])})

    def _dtype_behind(self, args: Any, kwargs: Any) -> str | None:
        narrow = [keras.backend.standardize_dtype(x.dtype) for x in keras.tree.flatten((args, kwargs)) if is_narrow(x)]
        return narrow[0] if narrow and self.casts_back else None


def float32_operation(operation: keras.Operation, args: Any, kwargs: Any, behind_all: bool) -> keras.Operation:
    """The operation itself, or one that runs it in float32 where that is needed for these arguments.

    Args:
        operation: an operation of a Functional model's graph.
        args: its arguments, symbolic tensors among them.
        kwargs: the same by name.
        behind_all: whether nothing computes behind it any more, so that its output is not to be rounded.
    """
    flat = keras.tree.flatten((args, kwargs))
    symbols = [x for x in flat if isinstance(x, keras.KerasTensor) and _is_float(x)]
    floats = {keras.backend.standardize_dtype(x.dtype) for x in symbols}
    narrow = floats.intersection(NARROW)
    if not narrow:
        return operation
    kind = type(operation).__name__ if type(operation).__module__.startswith("keras.") else None
    beyond = any(_is_beyond(x, dtype) for x in (*flat, *vars(operation).values()) for dtype in narrow)
    if beyond or kind in _REDUCTIONS or (kind in _GROWING and "float16" in narrow):
        casts_back = False
    elif kind in _GROWING or kind in _OTHERS or (len(floats) > 1 and not behind_all and kind != "Cast"):
        casts_back = not behind_all
    else:
        return operation
    return Float32Operation(operation, casts_back, name=operation.name)


def _is_beyond(value: Any, dtype: str) -> bool:
    """Whether a constant leaves the range of a 16-bit dtype, or becomes zero in it."""
    if isinstance(value, (bool, str, bytes)) or not isinstance(value, (int, float, np.ndarray, np.generic)):
        return False
    numbers = np.abs(np.asarray(value))
    if numbers.dtype.kind not in "fiu" or not numbers.size:
        return False
    finite = numbers[np.isfinite(numbers) & (numbers > 0)].astype("float64")
    limits = tf.as_dtype(dtype)
    smallest = 2.0**-25 if dtype == "float16" else 0.0  # half of the smallest subnormal number
    return bool(finite.size) and bool(finite.max() > float(limits.max) or finite.min() <= smallest)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype))


def _to_float(x: Any, dtype: str) -> Any:
    """A tensor of floats in another dtype, with the mask that goes along with it; all else as it is."""
    if not _is_float(x) or keras.backend.standardize_dtype(x.dtype) == dtype:
        return x
    mask = keras_layers.mask_of(x)
    cast = keras.ops.cast(x, dtype)
    return cast if mask is None else keras_layers.with_mask(cast, mask)


class _OfOneLayer:
    """Takes the place of a method of one layer. Keras finds it before the method of the class."""

    def __init__(self, layer: keras.Layer, method: str, dtype: str, around: Callable[..., Any]) -> None:
        self.layer, self.method, self.dtype, self.around = layer, method, dtype, around
        self.__name__, self.__doc__ = method, getattr(type(layer), method).__doc__
        self.__signature__ = inspect.signature(getattr(layer, method))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(getattr(type(self.layer), self.method), self.layer, self.dtype, *args, **kwargs)


def _call(method: Any, layer: keras.Layer, dtype: str, *args: Any, **kwargs: Any) -> Any:
    return keras.tree.map_structure(lambda y: _to_float(y, dtype), method(layer, *args, **kwargs))


def _output_spec(method: Any, layer: keras.Layer, dtype: str, *args: Any, **kwargs: Any) -> Any:
    def cast(y: Any) -> Any:
        return keras.KerasTensor(y.shape, dtype) if isinstance(y, keras.KerasTensor) and _is_float(y) else y

    return keras.tree.map_structure(cast, method(layer, *args, **kwargs))


def _add_loss(method: Any, layer: keras.Layer, dtype: str, loss: Any) -> None:
    method(layer, keras.tree.map_structure(lambda x: _to_float(x, dtype), loss))


def cast_outputs(layer: keras.Layer, dtype: str) -> None:
    """Makes one layer return another dtype than it computes in, as the code around it expects.

    TensorFlow adds no float32 tensor to a 16-bit one. In the code of a layer or model that holds this one, its output
    must have the dtype of the others. A new class or a wrapper would change the layer's name in files.

    Args:
        layer: a layer.
        dtype: "float16", "bfloat16" or "float32".

    Raises:
        ConversionError: for another dtype.
    """
    if dtype not in (*NARROW, "float32"):
        raise ConversionError(f'Outputs are cast to "float16", "bfloat16" or "float32". Received: dtype={dtype!r}.')
    vars(layer)["call"] = _OfOneLayer(layer, "call", dtype, _call)
    vars(layer)["compute_output_spec"] = _OfOneLayer(layer, "compute_output_spec", dtype, _output_spec)


def cast_losses(layer: keras.Layer) -> None:
    """Makes one layer add its losses in float32, so that Keras can add the losses of others to them.

    Args:
        layer: a layer.
    """
    vars(layer)["add_loss"] = _OfOneLayer(layer, "add_loss", "float32", _add_loss)


def output_cast(layer: keras.Layer) -> str | None:
    """Returns the dtype that `cast_outputs` has given to a layer's outputs, or None."""
    found = vars(layer).get("call")
    return found.dtype if isinstance(found, _OfOneLayer) else None


def casts_losses(layer: keras.Layer) -> bool:
    """Whether `cast_losses` holds for a layer."""
    return "add_loss" in inserted_attributes(layer)


def inserted_attributes(layer: keras.Layer) -> set[str]:
    """Returns the attributes that the functions above have set on a layer. A copy does not take them over."""
    return {name for name, value in vars(layer).items() if isinstance(value, _OfOneLayer)}
