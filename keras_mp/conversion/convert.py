"""`convert`: a model that exists, trained or not, under another dtype policy, and back."""

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import keras
import numpy as np

from keras_mp import activations, layers
from keras_mp._compat import execution, keras_hooks, keras_layers, keras_models
from keras_mp.conversion.clone import Choice, Rebuild
from keras_mp.conversion.compile_clone import compile_alike
from keras_mp.conversion.data_flow import Flow, flow_of, input_specs, is_foreign, trace
from keras_mp.conversion.inserted import (
    Float32Operation,
    OutputCast,
    UncastInputs,
    casts_losses,
    float32_operation,
    output_cast,
)
from keras_mp.errors import ConversionError, KerasMPWarning
from keras_mp.layers.core.reversible_embedding import twin_for_keras_hub
from keras_mp.layers.recurrent.conv_lstm import ConvLSTMCell
from keras_mp.policies.policy import chosen_policy, named_policy, policies_in, stacklevel
from keras_mp.policies.policy_map import PolicyMap
from keras_mp.training.penalties import Float32Regularizer, is_narrow

__all__ = ["convert", "duplicate"]

# The layer here for each of Keras's that 16 bits do not suit or that takes longer than it has to, and back.
_SAFE: dict[type, type] = {
    getattr(keras.layers, name): getattr(layers, name) for name in layers.__all__ if hasattr(keras.layers, name)
}
_SAFE[keras_layers.ConvLSTMCell] = ConvLSTMCell
_STOCK: dict[type, type] = {ours: stock for stock, ours in _SAFE.items()} | {layers.Head: keras.layers.Dense}
_SAFE_ACTIVATIONS: dict[Any, Any] = {
    getattr(keras.activations, name): getattr(activations, name)
    for name in activations.__all__
    if hasattr(keras.activations, name)
}
_STOCK_ACTIVATIONS: dict[Any, Any] = {ours: stock for stock, ours in _SAFE_ACTIVATIONS.items()}

_DENSE = (keras.layers.Dense, layers.Dense, layers.Head)  # each becomes a `Head` where it answers
_NARROW = ("float16", "bfloat16")


def convert(model: keras.Model, policy: "str | keras.DTypePolicy") -> keras.Model:
    """A copy of a model that computes the same function under another dtype policy.

    The layers of the copy have the weights of the model's, bit for bit, and its names. Under a policy that computes in
    16 bits, layers that 16 bits do not suit become the layers of that name here, and activations such as gelu likewise.
    In float32 stay:

    - layers that prepare data, and what only moves, compares or adds up inputs before the first layer with weights, so
      that no id, time or position is rounded on its way to where it is used as one;
    - layers that make positions, and operations of a Functional model's graph that sum, divide, exponentiate or
      compare; their outputs are cast where they meet 16-bit ones;
    - the last computing layer and what stands behind it. A `Dense` there becomes a `keras_mp.layers.Head`, which
      multiplies in 16 bits; what several layers make is cast;
    - losses that layers add, and penalties of their outputs;
    - layers that fail in 16 bits, in inference or in training. The model and the copy are traced to see that.

    A policy that a pattern of a `PolicyMap` names for such a layer holds. Under a policy that computes in float32 all
    of that is undone, so that `convert(convert(model, "mixed_bfloat16"), "float32")` is the model again.

    It takes Functional, Sequential and subclassed models, nested in each other, with shared layers, wrappers and layers
    of the user's, and copies all that they hold, attribute by attribute: adapted tables, vocabularies, LoRA,
    quantization, optimizers, and objects that Keras does not track, which stay untracked.

    A compiled model is compiled again, with a copy of its optimizer that goes on from the same state: wrapped in a
    `keras_mp.LossScaleOptimizer` where a layer computes in float16, and taken out of its wrapper where none does.
    Metrics start anew.

    Args:
        model: a Keras model, best one that is built; it stays as it is.
        policy: name of a policy or a `keras.DTypePolicy`; a `keras_mp.PolicyMap`, for which the path of a layer starts
            with the model's name; or "auto", what `keras_mp.detect` recommends for the hardware.

    Returns:
        The new model, of the same class.

    Raises:
        PolicyError: for a policy that does not exist.
        ConversionError: for what is not a Keras model, or a layer that cannot be copied.

    Warns:
        KerasMPWarning: naming layers that were left in float32 with the reason, outputs that stayed in 16 bits, and
            patterns of a `PolicyMap` that match no layer.

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
    """A copy of a model as it is: layers of the same classes and policies, weights, optimizer's state, its wrapper.

    Args:
        model: a Keras model, built or not; it stays as it is.
        choose: for layers that become others, as `Rebuild` takes it.

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
        warnings.filterwarnings("ignore", module="keras")  # Keras has said it when the model was made
        copy = rebuild(model)
    if isinstance(model, keras_models.Functional):
        copy.output_names = list(model.output_names)  # the keys of losses given by name
    compile_alike(model, copy, rebuild, keeps_wrapper=True)
    return copy


class _Conversion:
    """The conversion of a model: attempts, until one gives a model that runs in training and inference.

    Attributes:
        left: by class, or by path for layers of code that no class has, why layers are left in float32.
        wide: classes of layers that hold others, whose own code must see float32 numbers alone.
    """

    def __init__(self, model: keras.Model, wanted: keras.DTypePolicy) -> None:
        self.model, self.wanted = model, wanted
        self.left: dict[type | str, str] = {}
        self.wide: set[type] = set()
        self.narrow = any(policy.compute_dtype in _NARROW for policy in policies_in(wanted))
        self.foreign = any(map(is_foreign, keras_layers.layers_by_path(model).values()))
        specs = input_specs(model)
        flow, spec = flow_of(model, specs) if self.narrow else (None, None)
        # What no trace tells of a model that is not built yet.
        self.flow = Flow(last=_output_layers(model)) if flow is None else flow
        self.specs = specs if spec is None else [spec]
        hub = twin_for_keras_hub()
        self.safe = _SAFE | (dict([hub]) if hub else {})
        self.stock = _STOCK | {ours: stock for stock, ours in self.safe.items() if stock not in _SAFE}
        self.twinned = {*self.safe, *self.stock}
        # The penalty of `ActivityRegularization` is taken of what it is given.
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

    def warn(self, converted: keras.Model, outputs: list[Any], attempt: "_Attempt") -> None:
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
        self.rebuild = Rebuild(self.choose, self.finish_outputs, self.choose_operation)

    def make(self) -> keras.Model:
        with warnings.catch_warnings(), np.errstate(over="raise"):
            # Keras has said what it says of this model when the model was made. NumPy tells of a number, such as a mask
            # of -1e9, that float16 makes infinite.
            warnings.filterwarnings("ignore", module="keras")
            converted = self.rebuild(self.model)
            if isinstance(self.model, keras.Sequential):
                if any(map(is_narrow, _symbolic_outputs(converted))):
                    converted.add(OutputCast(name=f"{converted.layers[-1].name}_float32"))
            elif isinstance(self.model, keras_models.Functional):
                converted.output_names = list(self.model.output_names)  # the keys of losses given by name
        return converted

    def try_out(self, converted: keras.Model) -> list[Any]:
        """Traces the copy as it will run, and returns its outputs where that is known.

        Layers of Keras and of ours are known to run. A mode in which the model itself fails is not asked for.
        """
        if not self.conversion.foreign:
            return _symbolic_outputs(converted)
        for specs in self.conversion.specs:
            outputs = None
            for training in (False, True):
                try:
                    with np.errstate(over="raise"):
                        outputs = trace(converted, specs, training, self.running).outputs
                except Exception:
                    if _runs(self.model, specs, training):
                        raise
                    self.running.clear()  # these are not the inputs that it takes
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
        functions = _SAFE_ACTIVATIONS if narrow else _STOCK_ACTIVATIONS
        if isinstance(activation, Hashable) and activation in functions:
            arguments["activation"] = functions[activation]
        if isinstance(layer, keras_layers.ConvLSTMCell):
            arguments["rank"] = layer.rank  # which Keras's configuration of it leaves out
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
        # Some return float32 from 16-bit matmuls. What holds other layers is cast behind it instead: all that it
        # computes need not be in float32.
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
        """Whether the code of a layer that holds others is left in float32, and they return that to it.

        TensorFlow adds no float32 number to a 16-bit one. Code that does, as it takes inputs of the model exactly and
        activations, or is written for one dtype, gets one: then it is as it was, and what it calls computes in 16 bits.
        """
        return type(layer) in self.conversion.wide or id(layer) in self.conversion.flow.mixed_doors

    def is_in_float32(self, path: str) -> bool:
        parts = path.split("/")
        return any("/".join(parts[:depth]) in self.in_float32 for depth in range(1, len(parts) + 1))

    @functools.cached_property
    def layers_by_path(self) -> dict[str, keras.Layer]:
        return keras_layers.layers_by_path(self.model)

    def holders(self, path: str) -> list[keras.Layer]:
        """The layers that a layer stands in, from the innermost outwards."""
        parts = path.split("/")
        found = ["/".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
        return [self.layers_by_path[each] for each in found if each in self.layers_by_path]

    def output_dtype(self, layer: keras.Layer, path: str, compute_dtype: str) -> str | None:
        """What the outputs of a layer are cast to, for the code that calls it; None for nothing."""
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
        """The compute dtype of the code that a layer is called in."""
        outer = "/".join(path.split("/")[:-1])
        return "float32" if self.is_in_float32(outer) else named_policy(self.wanted, outer)[0].compute_dtype

    def choose_operation(self, operation: Any, copy: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(copy, Float32Operation):
            copy = copy.operation
        if not self.conversion.narrow:
            return copy
        return float32_operation(copy, args, kwargs, id(operation) in self.conversion.flow.tail)

    def finish_outputs(self, outputs: Any) -> Any:
        if not any(map(is_narrow, keras.tree.flatten(outputs))):
            return outputs
        # All of them, or the layers before some would come to lie deeper, and Keras lists weights by depth.
        casts: dict[int, OutputCast] = {}
        for output in keras.tree.flatten(outputs):
            maker = keras_models.origin(output)
            casts.setdefault(id(maker), OutputCast(name=f"{maker.name}_float32"))
        return keras.tree.map_structure(lambda output: casts[id(keras_models.origin(output))](output), outputs)

    def culprits(self, error: BaseException | None) -> list[keras.Layer]:
        """The layers of the copy in whose call an error arose, from the innermost outwards."""
        paths = self.rebuild.paths
        found = [each for each in reversed(self.running) if id(each) in paths]
        while error is not None and not found:
            frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
            found = [each for each in reversed(frames) if isinstance(each, keras.Layer) and id(each) in paths]
            error = error.__cause__ or error.__context__
        # What a layer of the user's hands to one of Keras's is the user's doing.
        foreign = [layer for layer in dict.fromkeys(found) if is_foreign(layer)]
        return foreign or list(dict.fromkeys(found))


def _runs(model: keras.Model, specs: Any, training: bool) -> bool:
    try:
        trace(model, specs, training)
    except Exception:  # whatever the user's code raises
        return False
    return True


def _output_layers(model: keras.Layer) -> set[int]:
    """By `id`, the layers that make the outputs of a model, as far as its graph tells."""
    return {id(layer) for layer in _last_layers(model) if layer is not model}


def _last_layers(layer: keras.Layer) -> list[keras.Layer]:
    if isinstance(layer, keras.Sequential):
        return _last_layers(layer.layers[-1]) if layer.layers else []
    if isinstance(layer, keras_models.Functional):
        made = [keras_models.origin(output) for output in layer.outputs]
        made = [each for each in made if isinstance(each, keras.Layer)]
        # What only casts an output stands for the layer that makes it.
        return [last for each in made for last in _last_layers(each)]
    return [layer]


def _symbolic_outputs(model: keras.Model) -> list[Any]:
    try:
        return list(model.outputs)
    except AttributeError:  # a subclassed model, or one that is not built
        return []


def _what_it_says(error: Exception) -> str:
    """The kind of an error and what it says, without what Keras puts around it."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    wrappings = ("Exception encountered when calling", "Could not automatically infer")
    lines = [line for line in lines if line and not line.startswith(wrappings)]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _warn_of_slow_convolutions(model: keras.Model) -> None:
    """Warns of Keras's depthwise convolutions that take longer to train in bfloat16 than in float32 on a CPU."""
    slow = [
        path
        for path, layer in keras_layers.layers_by_path(model).items()
        if type(layer) is keras.layers.DepthwiseConv2D
        and layer.compute_dtype == "bfloat16"
        and (max(layer.strides) > 1 or max(layer.kernel_size) > 3)
    ]
    if slow and execution.on_cpu():
        others = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        warnings.warn(
            f"{slow[0]!r}{others} in model {model.name!r}: on a CPU, Keras's DepthwiseConv2D takes longer to train in "
            "bfloat16 than in float32 where it has strides or a kernel larger than 3 x 3. Take "
            'keras_mp.layers.DepthwiseConv2D, or type model = keras_mp.convert(model, "mixed_bfloat16").',
            KerasMPWarning,
            stacklevel=stacklevel(),
        )


keras_hooks.call_before_training(_warn_of_slow_convolutions)
