"""What a model is called by: its inputs and outputs, their names, dtypes and shapes, in a signature for serving."""

import dataclasses
import itertools
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp.errors import ExportError

__all__ = ["Signature", "TensorInfo", "as_array", "by_name", "named_outputs", "signature_of", "widened"]

# What TensorFlow Serving's REST interface converts from JSON and to it (its util/json_tensor.cc). Half and bfloat16 are
# not on the list, nor is uint16.
_SERVED = ("float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint32", "uint64", "bool", "string")

# Names that a user gives: all of them in order, or new ones by the names they would have.
Names = Sequence[str] | Mapping[str, str] | None


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output of a signature.

    Attributes:
        name: its name in the signature.
        dtype: the name of its dtype there.
        shape: its shape, None where the size is free.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Signature:
    """How a model is called by name.

    Attributes:
        model: the Keras model.
        inputs: its inputs, in the order in which Keras flattens them.
        outputs: names that the user gave to its outputs, or None.
    """

    model: keras.Model
    inputs: tuple[TensorInfo, ...]
    outputs: Names = None

    def call(self, tensors: Mapping[str, Any], forward: Callable[[Any], Any]) -> dict[str, tf.Tensor]:
        """Answers by name, in the dtypes that the model computes in.

        Args:
            tensors: the inputs by name.
            forward: the model, or what stands in for it: gets the inputs in the model's own structure.
        """
        given = [tf.convert_to_tensor(tensors[info.name]) for info in self.inputs]
        own = named_outputs(self.model, forward(keras.tree.pack_sequence_as(_structure(self.model), given)))
        return dict(zip(self.named(list(own)), own.values(), strict=True))

    def named(self, own: list[str]) -> list[str]:
        """The names of the outputs in the signature.

        Args:
            own: the names that they would have if the user had given none.

        Raises:
            ExportError: the user's names do not fit them.
        """
        return _chosen(own, self.outputs, "output", self.model)


def signature_of(model: keras.Model, inputs: Names = None, outputs: Names = None) -> Signature:
    """The signature of a model.

    Args:
        model: a built model with symbolic inputs.
        inputs: names for its inputs, or None for the model's own.
        outputs: names for its outputs, or None for the model's own.

    Raises:
        ExportError: for a model without symbolic inputs, an input that a server cannot be given, or names that do not
            fit or that fall together.

    Example:

    >>> import keras
    >>> x = keras.Input((4,), dtype="float16", name="user-id")
    >>> signature_of(keras.Model(x, keras.layers.Dense(1)(x))).inputs
    (TensorInfo(name='user_id', dtype='float32', shape=(None, 4)),)
    """
    structure = _structure(model)
    tensors = keras.tree.flatten(structure)
    own = _distinct([_parameter_name(name) for name in _names(structure, [tensor.name for tensor in tensors])])
    names = _chosen(own, inputs, "input", model)
    for name in names:
        if name != _parameter_name(name):
            raise ExportError(
                f"{name!r} cannot be the name of an input: a signature takes letters, digits and '_', no keyword of "
                f"Python and not 'self'. Type {_parameter_name(name)!r}."
            )
    infos = []
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.shape is None or getattr(tensor, "sparse", False) or getattr(tensor, "ragged", False):
            kind = "no fixed rank" if tensor.shape is None else "sparse or ragged values"
            raise ExportError(
                f"Input {name!r} of model {model.name!r} has {kind}, which no request can hold. Give it a shape, with "
                'None for a size that is not known, such as keras.Input((None,), name="token").'
            )
        shape = (None, *tensor.shape[1:]) if tensor.shape else ()
        infos.append(TensorInfo(name, _served(_widened_dtype(tensor.dtype), "Input", name), shape))
    return Signature(model, tuple(infos), outputs)


def named_outputs(model: keras.Model, answers: Any) -> dict[str, tf.Tensor]:
    """The outputs of a model by its own names for them.

    Args:
        model: the model.
        answers: what it answered, in its own structure.
    """
    flat = keras.tree.flatten(answers)
    layers = [model.layers[-1].name] * len(flat) if isinstance(model, keras.Sequential) else model.output_names
    return dict(zip(_distinct(_names(answers, layers)), flat, strict=True))


def widened(tensor: tf.Tensor, name: str) -> tf.Tensor:
    """An output as it is served: float32 where it is a 16-bit float.

    Args:
        tensor: the output.
        name: its name, for the message.

    Raises:
        ExportError: its dtype is not one that TensorFlow Serving can answer in JSON, or its rank is not fixed.
    """
    if not isinstance(tensor, tf.Tensor):
        raise ExportError(
            f"Output {name!r} is a {type(tensor).__name__}, and a server answers with plain tensors only. Make it one, "
            "such as with `.to_tensor()`, in the model."
        )
    if tensor.shape.rank is None:
        raise ExportError(
            f"Output {name!r} has no fixed rank, so a server cannot say what it answers. Give it a shape in the layer "
            "that makes it, by tf.ensure_shape or keras.ops.reshape."
        )
    dtype = _widened_dtype(tensor.dtype.name)
    _served(dtype, "Output", name)
    return tf.cast(tensor, dtype)


def by_name(batch: Any, signature: Signature) -> dict[str, np.ndarray]:
    """A batch as arrays by the names of a signature, in its dtypes.

    Args:
        batch: inputs as the model takes them, an array, or a list or dictionary of arrays; or by the signature's names;
            or a tuple of these and what else `fit` takes.
        signature: as `signature_of` gave it.

    Raises:
        ExportError: an input is missing, there is one too many, or it is nothing that the input can be.
    """
    structure, inputs = _structure(signature.model), [info.name for info in signature.inputs]
    batch = _without_labels(batch, structure, signature)
    if isinstance(batch, Mapping) and set(batch) == set(inputs):
        arrays = dict(batch)
    elif isinstance(batch, Mapping) and isinstance(structure, Mapping) and set(batch) == set(structure):
        arrays = dict(zip(inputs, keras.tree.flatten(batch), strict=True))
    elif keras.tree.is_nested(structure) or isinstance(batch, Mapping):
        flat = keras.tree.flatten(batch)
        names = [_parameter_name(name) for name in _names(batch, inputs)]
        if len(flat) != len(inputs) or set(names) != set(inputs):
            received = sorted(names) if isinstance(batch, Mapping) else f"{len(flat)} arrays"
            raise ExportError(
                f"The batch must give the model's inputs {inputs}, as a dictionary or in this order. Received: "
                f"{received}"
            )
        arrays = dict(zip(names, flat, strict=True))
    else:
        # One input: rows, or Keras's list of one array. A list of numbers is rows.
        alone = isinstance(batch, (list, tuple)) and len(batch) == 1 and hasattr(batch[0], "shape")
        arrays = {inputs[0]: batch[0] if alone else batch}
    return {info.name: _as_input(arrays[info.name], info) for info in signature.inputs}


def _without_labels(batch: Any, structure: Any, signature: Signature) -> Any:
    """The inputs of (inputs, labels) and (inputs, labels, weights)."""
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        return batch
    first = batch[0]
    if keras.tree.is_nested(structure):
        return first if keras.tree.is_nested(first) and len(first) == len(signature.inputs) else batch
    return first if len(getattr(first, "shape", ())) == len(signature.inputs[0].shape) else batch


def _as_input(given: Any, info: TensorInfo) -> np.ndarray:
    try:
        return as_array(tf.cast(given, info.dtype))
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise ExportError(
            f"Input {info.name!r} takes {info.dtype} of shape {info.shape}; the batch gives {type(given).__name__}, "
            f"which is not that: {(str(error).splitlines() or [''])[0][:200]} Give arrays, such as one batch of a "
            "dataset: next(iter(dataset))."
        ) from error


def as_array(tensor: tf.Tensor) -> np.ndarray:
    """A tensor as an array; strings as bytes, for NumPy would hold them as objects, which only a pickle could store."""
    return tensor.numpy().astype("S") if tensor.dtype == tf.string else tensor.numpy()


def _structure(model: keras.Model) -> Any:
    """The symbolic inputs as the model takes them: a tensor, or lists and dictionaries of them."""
    if not isinstance(model, keras.Model):
        raise ExportError(f"Expected a keras.Model, received {model!r} of type {type(model).__name__}.")
    if not getattr(model, "inputs", None):
        raise ExportError(
            f"Model {model.name!r} has no symbolic inputs, so its signature is not known. For a Sequential model put "
            "keras.Input(shape) first; for any other type inputs = keras.Input(shape), which takes a dtype as well, "
            "and export keras.Model(inputs, model(inputs))."
        )
    # A Sequential model has no `input` before its first call.
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _names(structure: Any, own_names: Sequence[str]) -> Sequence[str]:
    """A name for each tensor in a structure: its own, or where it stands if that has names."""
    paths = [path for path, _ in keras.tree.flatten_with_path(structure)]
    if any(isinstance(step, str) for path in paths for step in path):
        return ["_".join(str(step) for step in path) for path in paths]
    return own_names


def _distinct(names: Sequence[str]) -> list[str]:
    """The same names; one that comes again gets a number."""
    distinct: list[str] = []
    for name in names:
        others = (f"{name}_{number}" for number in itertools.count(1))
        distinct.append(next(each for each in itertools.chain([name], others) if each not in distinct))
    return distinct


def _chosen(own: list[str], wanted: Names, kind: str, model: keras.Model) -> list[str]:
    if wanted is None:
        return own
    told = f"The {kind}s of model {model.name!r} are {own}."
    if isinstance(wanted, str):
        raise ExportError(f"{told} Received {wanted!r} for their names. Type [{wanted!r}].")
    if isinstance(wanted, Mapping):
        unknown = sorted(set(wanted) - set(own))
        if unknown:
            raise ExportError(f"{told} Received names for {unknown}. Give new names by these.")
        names = [wanted.get(name, name) for name in own]
    else:
        names = list(wanted)
        if len(names) != len(own):
            raise ExportError(f"{told} Received {len(names)} names, {names}. Give one for each, in this order.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ExportError(f"{told} Received {twice} for more than one of them. Give each a name of its own.")
    return names


def _parameter_name(name: str) -> str:
    """TensorFlow makes parameters of a Python function of a signature's inputs, and `self` is one of its own."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", name)
    name = name if name[:1].isalpha() else f"arg_{name}"
    return f"{name}_" if keyword.iskeyword(name) or name == "self" else name


def _widened_dtype(dtype: str) -> str:
    return "float32" if dtype in ("float16", "bfloat16", "half") else dtype


def _served(dtype: str, kind: str, name: str) -> str:
    if dtype not in _SERVED:
        raise ExportError(
            f"{kind} {name!r} is {dtype}, which TensorFlow Serving cannot convert from JSON or to it. Cast it in the "
            f"model to one of {', '.join(_SERVED)}."
        )
    return dtype
