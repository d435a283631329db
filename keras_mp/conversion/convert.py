"""`convert`: a model that exists, trained or not, under another dtype policy, and back."""

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import layers
from keras_mp._compat import keras_layers, keras_models
from keras_mp.conversion.casts import (
    Float32Operation,
    OutputCast,
    UncastInputs,
    casts_losses,
    float32_operation,
    output_cast,
)
from keras_mp.conversion.clone import Choice, Rebuild
from keras_mp.conversion.compilation import compile_alike
from keras_mp.conversion.data_flow import Flow, flow_of
from keras_mp.conversion.outputs import in_float32, output_layers, symbolic_outputs
from keras_mp.conversion.tracing import Specs, input_specs, is_foreign, trace
from keras_mp.conversion.twins import SAFE, SAFE_ACTIVATIONS, STOCK, STOCK_ACTIVATIONS
from keras_mp.errors import ConversionError, KerasMPWarning
from keras_mp.layers.core.reversible_embedding import twin_for_keras_hub
from keras_mp.policies.policy import chosen_policy, stacklevel
from keras_mp.policies.policy_map import PolicyMap, named_policy, policies_in
from keras_mp.training.penalties import Float32Regularizer, is_narrow

__all__ = ["convert", "duplicate"]

_DENSE = (keras.layers.Dense, layers.Dense, layers.Head)  # each becomes a `Head` where it makes an output
_NARROW = ("float16", "bfloat16")


def convert(model: keras.Model, policy: "str | keras.DTypePolicy") -> keras.Model:
    """Returns a copy of a model that computes the same function under another dtype policy.

    The copy has the model's names and its weights, bit for bit. Under a 16-bit policy, layers that need care in half
    precision become the layers of that name here. So do activations such as gelu. These stay in float32:

    - layers that prepare data, and layers before the first one with weights that only move, compare or add inputs. So
      no id, time or position is rounded on its way to the layer that uses it.
    - layers that make positions, and operations of a Functional model's graph that sum, divide, exponentiate or
      compare. Their outputs are cast where they meet 16-bit tensors.
    - the last computing layer and all that stands behind it. A `Dense` there becomes a `keras_mp.layers.Head`, whose
      matmul runs in half precision. Outputs that several layers make are cast.
    - losses that layers add, and penalties of their outputs.
    - layers that fail in half precision, in inference or in training. The model and the copy are traced to find them.

    If a pattern of a `PolicyMap` names a policy for such a layer, that policy holds. A float32 policy undoes all of
    this: `convert(convert(model, "mixed_bfloat16"), "float32")` is the model again.

    It takes Functional, Sequential and subclassed models. They may be nested, and may have shared layers, wrappers and
    custom layers. It copies all that they hold, attribute by attribute: adapted tables, vocabularies, LoRA,
    quantization and optimizers. Objects that Keras does not track stay untracked.

    A compiled model is compiled again. A copy of its optimizer goes on from the same state. It is wrapped in a
    `keras_mp.LossScaleOptimizer` if a layer computes in float16, and unwrapped if none does. Metrics start anew.

    Args:
        model: a Keras model, preferably built. It stays as it is.
        policy: the name of a policy or a `keras.DTypePolicy`. A `keras_mp.PolicyMap`, whose paths start with the
            model's name. Or "auto", the recommendation of `keras_mp.detect` for the hardware.

    Returns:
        The new model, of the same class.

    Raises:
        PolicyError: for a policy that does not exist.
        ConversionError: `model` is not a Keras model, or has a layer that cannot be copied.

    Warns:
        KerasMPWarning: with the layers that were left in float32 and the reason, the outputs that are still 16-bit
            floats, and the patterns of a `PolicyMap` that match no layer.

    Example:

    >>> import keras, keras_mp
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.LayerNormalization(), keras.layers.Dense(2)])
    >>> mixed = keras_mp.convert(model, "mixed_bfloat16")
    >>> [type(layer).__name__ for layer in mixed.layers], mixed(tf.ones((1, 4))).dtype
    (['LayerNormalization', 'Head'], tf.float32)
    >>> mixed.layers[0].compute_dtype, type(keras_mp.convert(mixed, "float32").layers[1]).__name__
    ('bfloat16', 'Dense')
    """
    if not isinstance(model, keras.Model):
        raise ConversionError(
            f"`convert` takes a keras.Model. Received: {model!r} of type {type(model).__name__}. For a file type "
            "keras_mp.load_model(path, policy)."
        )
    wanted = chosen_policy(policy, "convert(model, {})")
    converted = _Conversion(model, wanted).run()
    converted._converted_to = keras.dtype_policies.serialize(wanted)  # for its files
    return converted


def _as_it_is(layer: keras.Layer, path: str) -> Choice:
    return Choice(type(layer), layer.dtype_policy, {}, output_cast(layer), casts_losses(layer))


def duplicate(model: keras.Model, choose: Callable[[keras.Layer, str], Choice] = _as_it_is) -> keras.Model:
    """Returns a copy of a model as it is: classes, policies, weights, and the optimizer with its state and wrapper.

    Args:
        model: a Keras model, built or not. It stays as it is.
        choose: the choice for each layer, as `Rebuild` takes it.

    Returns:
        The copy, compiled as the model is.

    Raises:
        ConversionError: for a layer that cannot be copied.

    Example:

    >>> import keras, keras_mp
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.LayerNormalization(dtype="mixed_bfloat16")])
    >>> copy = duplicate(model)
    >>> type(copy.layers[0]) is keras.layers.LayerNormalization, copy.layers[0].compute_dtype
    (True, 'bfloat16')
    """
    rebuild = Rebuild(choose)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="keras")  # Keras issued them when the model was made
        copy = rebuild(model)
    if isinstance(model, keras_models.Functional):
        copy.output_names = list(model.output_names)  # the keys of losses given by name
    compile_alike(model, copy, rebuild, keeps_wrapper=True)
    return copy


class _Conversion:
    """The conversion of a model: attempts, until the copy runs in training and inference.

    Attributes:
        left: the reasons for layers in float32, by class. `Lambda` layers stand by path.
        wide: classes of layers that hold others and whose own code needs float32 tensors.
    """

    def __init__(self, model: keras.Model, wanted: keras.DTypePolicy) -> None:
        self.model, self.wanted = model, wanted
        self.left: dict[type | str, str] = {}
        self.wide: set[type] = set()
        self.narrow = any(policy.compute_dtype in _NARROW for policy in policies_in(wanted))
        self.foreign = any(map(is_foreign, keras_layers.layers_by_path(model).values()))
        specs = input_specs(model)
        flow, spec = flow_of(model, specs) if self.narrow else (None, None)
        # A model that is not built cannot be traced.
        self.flow = Flow(last=output_layers(model)) if flow is None else flow
        self.specs = specs if spec is None else [spec]
        hub = twin_for_keras_hub()
        self.safe = SAFE | (dict([hub]) if hub else {})
        self.stock = STOCK | {ours: stock for stock, ours in self.safe.items() if stock not in SAFE}
        self.twinned = {*self.safe, *self.stock}
        # `ActivityRegularization` penalizes its inputs.
        self.stay = (*keras_models.preprocessing_classes(), layers.Float32, keras.layers.ActivityRegularization)

    def run(self) -> keras.Model:
        while True:
            attempt = _Attempt(self)
            try:
                converted = attempt.make()
                outputs = attempt.try_out(converted) if self.narrow else []
                break
            except ConversionError:
                raise
            except Exception as error:
                self.learn(attempt, error)
        compile_alike(self.model, converted, attempt.rebuild)
        self.warn(converted, outputs, attempt)
        return converted

    def learn(self, attempt: "_Attempt", error: Exception) -> None:
        """Makes sure that the next attempt differs from one that has failed."""
        reason = _what_it_says(error)
        for layer in attempt.culprits(error):
            by_path = isinstance(layer, keras.layers.Lambda)
            key: type | str = attempt.rebuild.paths[id(layer)] if by_path else type(layer)
            if isinstance(key, type) and keras_layers.inner_layers(layer) and key not in self.wide:
                self.wide.add(key)
                return
            if key not in self.left and type(layer) is not type(self.model):
                self.left[key] = reason
                return
        raise ConversionError(f"{self.model.name!r} cannot be converted to {self.wanted.name!r}: {reason}") from error

    def is_left(self, layer: keras.Layer, path: str) -> bool:
        return type(layer) in self.left or path in self.left

    def warn(self, converted: keras.Model, outputs: list[keras.KerasTensor | tf.Tensor], attempt: "_Attempt") -> None:
        messages = []
        by_path = keras_layers.layers_by_path(converted)
        for key, reason in self.left.items():
            paths = [path for path, layer in by_path.items() if key in (type(layer), path)]
            kind = key if isinstance(key, type) else type(by_path[key])
            others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            messages.append(
                f"{kind.__name__} fails in {self.wanted.compute_dtype}, so {paths[0]!r}{others} is left in float32. "
                f"{reason} What a layer makes itself should be of its compute dtype, as keras.ops.ones(shape, "
                "dtype=self.compute_dtype), and within its range."
            )
        if any(map(is_narrow, outputs)):
            messages.append(
                f"An output of {converted.name!r} is still a 16-bit float, for no layer makes it that could compute in "
                'float32. Cast it in `call`: keras.ops.cast(output, "float32").'
            )
        if isinstance(self.wanted, PolicyMap):
            for pattern, close in self.wanted.unmatched(converted).items():
                hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
                messages.append(f"The pattern {pattern!r} matches no layer of {converted.name!r}.{hint}")
        for message in messages:
            warnings.warn(message, KerasMPWarning, stacklevel=stacklevel())


class _Attempt:
    """One attempt of a conversion."""

    def __init__(self, conversion: _Conversion) -> None:
        self.conversion, self.model, self.wanted = conversion, conversion.model, conversion.wanted
        self.in_float32: set[str] = set()  # paths, which stand for what is inside as well
        self.running: list[keras.Operation] = []  # the layers that were being called when an error came
        self.rebuild = Rebuild(self.choose, in_float32, self.choose_operation)

    def make(self) -> keras.Model:
        with warnings.catch_warnings(), np.errstate(over="raise"):
            # Keras issued its warnings when the model was made. NumPy raises for a number that float16 makes infinite,
            # such as a mask of -1e9.
            warnings.filterwarnings("ignore", module="keras")
            converted = self.rebuild(self.model)
            if isinstance(self.model, keras.Sequential):
                if any(map(is_narrow, symbolic_outputs(converted))):
                    converted.add(OutputCast(name=f"{converted.layers[-1].name}_float32"))
            elif isinstance(self.model, keras_models.Functional):
                converted.output_names = list(self.model.output_names)  # the keys of losses given by name
        return converted

    def try_out(self, converted: keras.Model) -> list[keras.KerasTensor | tf.Tensor]:
        """Traces the copy as it will run, and returns its outputs where they are known.

        Layers of Keras and of ours are known to run. A mode in which the model itself fails is left out.
        """
        if not self.conversion.foreign:
            return symbolic_outputs(converted)
        for specs in self.conversion.specs:
            outputs = None
            for training in (False, True):
                try:
                    with np.errstate(over="raise"):
                        outputs = trace(converted, specs, training, self.running).outputs
                except Exception:
                    if _runs(self.model, specs, training):
                        raise
                    self.running.clear()  # the model does not take these inputs
            if outputs is not None:
                return outputs
        return []

    def choose(self, layer: keras.Layer, path: str) -> Choice | None:
        policy = self.policy_for(layer, path)
        narrow = policy.compute_dtype in _NARROW
        if isinstance(layer, OutputCast) and not narrow:
            return None
        twins = self.conversion.safe if narrow else self.conversion.stock
        cls = twins.get(type(layer), type(layer))
        if narrow and type(layer) in _DENSE and self.is_last(layer):
            cls = layers.Head
        arguments = {}
        activation = getattr(layer, "activation", None)
        functions = SAFE_ACTIVATIONS if narrow else STOCK_ACTIVATIONS
        if isinstance(activation, Hashable) and activation in functions:
            arguments["activation"] = functions[activation]
        if isinstance(layer, keras_layers.ConvLSTMCell):
            arguments["rank"] = layer.rank  # Keras's configuration leaves it out
        penalty = layer.activity_regularizer
        if narrow and penalty is not None and not isinstance(penalty, Float32Regularizer):
            arguments["activity_regularizer"] = Float32Regularizer(penalty)
        elif not narrow and isinstance(penalty, Float32Regularizer):
            arguments["activity_regularizer"] = penalty.regularizer
        flow = self.conversion.flow
        if layer.quantization_mode is not None:
            return Choice(cls, policy, arguments)
        if narrow and id(layer) in flow.raw_inputs and cls is type(layer):
            policy = UncastInputs(policy.name)
        losses = narrow and id(layer) in flow.losses
        return Choice(cls, policy, arguments, self.output_dtype(layer, path, policy.compute_dtype), losses)

    def policy_for(self, layer: keras.Layer, path: str) -> keras.DTypePolicy:
        if layer.compute_dtype not in (*_NARROW, "float32", self.model.compute_dtype):
            return layer.dtype_policy
        if isinstance(layer, self.conversion.stay) or self.conversion.is_left(layer, path):
            self.in_float32.add(path)
        if self.is_in_float32(path):
            return keras.DTypePolicy("float32")
        wanted, named = named_policy(self.wanted, path)
        if named or wanted.compute_dtype not in _NARROW:
            return wanted
        # Some layers return float32 from 16-bit matmuls. A layer that holds others gets a cast behind it instead, so
        # that the layers inside it need not compute in float32.
        tied = isinstance(layer, keras.layers.ReversibleEmbedding) and type(layer) in self.conversion.twinned
        is_wide = tied or type(layer) in _DENSE
        answers = self.is_last(layer) and not is_wide and not keras_layers.inner_layers(layer)
        flow = self.conversion.flow
        if answers or id(layer) in flow.exact:
            self.in_float32.add(path)
            return keras.DTypePolicy("float32")
        if id(layer) in flow.losses and not keras_layers.inner_layers(layer):
            return keras.DTypePolicy("float32")
        if id(layer) in flow.own_code or self.is_wide(layer):
            return keras.DTypePolicy("float32")  # for its own code alone
        return wanted

    def is_last(self, layer: keras.Layer) -> bool:
        return id(layer) in self.conversion.flow.last

    def is_wide(self, layer: keras.Layer) -> bool:
        """Whether the own code of a layer that holds others runs in float32, and gets float32 from those.

        TensorFlow adds no float32 tensor to a 16-bit one. Some code mixes exact inputs with activations, or is written
        for one dtype. It gets float32 tensors alone, while the layers that it calls compute in half precision.
        """
        return type(layer) in self.conversion.wide or id(layer) in self.conversion.flow.mixed_doors

    def is_in_float32(self, path: str) -> bool:
        parts = path.split("/")
        return any("/".join(parts[:depth]) in self.in_float32 for depth in range(1, len(parts) + 1))

    @functools.cached_property
    def layers_by_path(self) -> dict[str, keras.Layer]:
        return keras_layers.layers_by_path(self.model)

    def holders(self, path: str) -> list[keras.Layer]:
        """Returns the layers around a layer, from the innermost outwards."""
        parts = path.split("/")
        found = ["/".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
        return [self.layers_by_path[each] for each in found if each in self.layers_by_path]

    def output_dtype(self, layer: keras.Layer, path: str, compute_dtype: str) -> str | None:
        """Returns the dtype to cast a layer's outputs to for the code that calls it, or None."""
        flow, holders = self.conversion.flow, self.holders(path)
        if not holders:
            return None
        if self.is_wide(holders[0]) and not self.is_in_float32(path):
            return "float32" if compute_dtype in _NARROW else None
        around = self.dtype_around(path)
        if compute_dtype != "float32" or around not in _NARROW:
            return None
        left = is_foreign(holders[0]) and self.conversion.is_left(layer, path)
        meets = left or id(layer) in flow.mixing or id(layer) in flow.own_code or self.is_wide(layer)
        return around if meets else None

    def dtype_around(self, path: str) -> str:
        """Returns the compute dtype of the code that calls a layer."""
        outer = "/".join(path.split("/")[:-1])
        return "float32" if self.is_in_float32(outer) else named_policy(self.wanted, outer)[0].compute_dtype

    def choose_operation(
        self, operation: keras.Operation, copy: keras.Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> keras.Operation:
        if isinstance(copy, Float32Operation):
            copy = copy.operation
        if not self.conversion.narrow:
            return copy
        return float32_operation(copy, args, kwargs, id(operation) in self.conversion.flow.tail)

    def culprits(self, error: BaseException | None) -> list[keras.Layer]:
        """Returns the layers of the copy in whose call an error arose, from the innermost outwards."""
        paths = self.rebuild.paths
        found = [each for each in reversed(self.running) if id(each) in paths]
        while error is not None and not found:
            frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
            found = [each for each in reversed(frames) if isinstance(each, keras.Layer) and id(each) in paths]
            error = error.__cause__ or error.__context__
        # If a layer of Keras fails inside a custom layer, the custom layer gave it its inputs.
        foreign = [layer for layer in dict.fromkeys(found) if is_foreign(layer)]
        return foreign or list(dict.fromkeys(found))


def _runs(model: keras.Model, specs: Specs, training: bool) -> bool:
    try:
        trace(model, specs, training)
    except Exception:  # any error of the user's code
        return False
    return True


def _what_it_says(error: Exception) -> str:
    """Returns the kind of an error and its message, without the lines that Keras adds."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    wrappings = ("Exception encountered when calling", "Could not automatically infer")
    lines = [line for line in lines if line and not line.startswith(wrappings)]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
