"""`convert`: a model that exists, trained or not, under another dtype policy, and back."""

import re
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import keras
import numpy as np

from keras_mp import activations, backend, layers
from keras_mp.errors import ConversionError, KerasMPWarning
from keras_mp.optimizer import LossScaleOptimizer
from keras_mp.policy import chosen_policy, needs_loss_scaling, stacklevel
from keras_mp.policy_map import PolicyMap
from keras_mp.rebuild import Choice, Rebuild
from keras_mp.training import Model

__all__ = ["Float32Regularizer", "OutputCast", "convert", "duplicate"]

# The layer here for each of Keras's that 16 bits do not suit or that takes longer than it has to, and back.
_SAFE: dict[type, type] = {
    getattr(keras.layers, name): getattr(layers, name) for name in layers.__all__ if hasattr(keras.layers, name)
}
_STOCK: dict[type, type] = {ours: stock for stock, ours in _SAFE.items()} | {layers.Head: keras.layers.Dense}
_SAFE_ACTIVATIONS: dict[Any, Any] = {
    getattr(keras.activations, name): getattr(activations, name)
    for name in activations.__all__
    if hasattr(keras.activations, name)
}
_STOCK_ACTIVATIONS: dict[Any, Any] = {ours: stock for stock, ours in _SAFE_ACTIVATIONS.items()}

_NARROW = ("float16", "bfloat16")


@keras.saving.register_keras_serializable(package="keras_mp")
class OutputCast(keras.layers.Layer):
    """Casts a 16-bit output of a model to float32, where the layer that makes it cannot answer in float32 itself.

    `convert` puts it there, and takes it out on the way back.

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
        return keras.ops.cast(inputs, "float32") if _is_narrow(inputs) else inputs

    def compute_output_spec(self, inputs: Any) -> Any:
        """The output as a symbolic tensor."""
        return keras.KerasTensor(inputs.shape, "float32" if _is_narrow(inputs) else inputs.dtype)


@keras.saving.register_keras_serializable(package="keras_mp")
class Float32Regularizer(keras.regularizers.Regularizer):
    """Takes another regularizer's penalty in float32, for outputs of 16 bits, of which Keras cannot add it to the loss.

    `convert` puts it around the `activity_regularizer` of a layer, and takes it off on the way back.

    Args:
        regularizer: a Keras regularizer, or the name of one.

    Example:

    >>> import keras_mp
    >>> float(Float32Regularizer("l2")(tf.fill((300, 300), tf.constant(10, "float16"))))
    90000.0
    """

    def __init__(self, regularizer: Any) -> None:
        self.regularizer = keras.regularizers.get(regularizer)

    def __call__(self, x: Any) -> Any:
        """The penalty, float32."""
        return self.regularizer(keras.ops.cast(x, "float32"))

    def get_config(self) -> dict[str, Any]:
        """The arguments that make an equal regularizer."""
        return {"regularizer": keras.regularizers.serialize(self.regularizer)}


def convert(model: keras.Model, policy: "str | keras.DTypePolicy") -> keras.Model:
    """A copy of a model that computes the same function under another dtype policy.

    The layers of the copy have the weights of the model's, bit for bit, and its names. Under a policy that computes in
    16 bits, layers that 16 bits do not suit become the layers of that name here: normalization, attention, pooling,
    resizing and recurrent layers, and activations such as gelu and softmax. Layers that prepare data stay in float32,
    and the outputs of the model are float32: a `Dense` there becomes a `keras_mp.layers.Head`, another single layer is
    left in float32, and what several layers make is cast. Under a policy that computes in float32 all of that is
    undone, so that `convert(convert(model, "mixed_bfloat16"), "float32")` is the model again.

    It takes Functional, Sequential and subclassed models, nested in each other, with shared layers, wrappers and layers
    of the user's. What holds layers is copied attribute by attribute, without its constructor and configuration. A
    layer that fails in 16 bits is left in float32.

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
    left: dict[type, str] = {}
    while True:
        conversion = _Conversion(model, wanted, left)
        try:
            converted = conversion.run()
            break
        except ConversionError:
            raise
        except Exception as error:
            culprit = conversion.culprit(error)
            if culprit is None or culprit in left or culprit is type(model):
                raise ConversionError(
                    f"{model.name!r} cannot be converted to {wanted.name!r}: {_what_it_says(error)}"
                ) from error
            left[culprit] = _what_it_says(error)
    converted._converted_to = keras.dtype_policies.serialize(wanted)  # for its files
    _warn(converted, wanted, left)
    return converted


def _as_it_is(layer: keras.Layer, path: str) -> Choice:
    return Choice(type(layer), layer.dtype_policy)


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
    if isinstance(model, backend.Functional):
        copy.output_names = list(model.output_names)  # the keys of losses given by name
    _compile_alike(model, copy, rebuild, keeps_wrapper=True)
    return copy


class _Conversion:
    """One attempt to convert a model, with the layers of some classes left in float32."""

    def __init__(self, model: keras.Model, wanted: keras.DTypePolicy, left: Iterable[type]) -> None:
        self.model, self.wanted = model, wanted
        # The penalty of `ActivityRegularization` is taken of what it is given.
        stay = (*backend.preprocessing_classes(), layers.Float32, keras.layers.ActivityRegularization)
        self.stay = (*stay, *left)
        self.in_float32: set[str] = set()  # paths, which stand for what is inside as well
        self.outputs = _output_layers(model)
        self.rebuild = Rebuild(self.choose, self.finish_outputs)

    def run(self) -> keras.Model:
        with warnings.catch_warnings(), np.errstate(over="raise"):
            # Keras has said what it says of this model when the model was made. NumPy tells of a number, such as a mask
            # of -1e9, that float16 makes infinite.
            warnings.filterwarnings("ignore", module="keras")
            converted = self.rebuild(self.model)
            if isinstance(self.model, keras.Sequential):
                if any(map(_is_narrow, _symbolic_outputs(converted))):
                    converted.add(OutputCast(name=f"{converted.layers[-1].name}_float32"))
            elif isinstance(self.model, backend.Functional):
                converted.output_names = list(self.model.output_names)  # the keys of losses given by name
            else:
                self.outputs = self.layers_that_answer(converted)
                if self.outputs:
                    self.rebuild = Rebuild(self.choose)
                    converted = self.rebuild(self.model)
        _compile_alike(self.model, converted, self.rebuild)
        return converted

    def choose(self, layer: keras.Layer, path: str) -> Choice | None:
        policy = self.policy_for(layer, path)
        narrow = policy.compute_dtype in _NARROW
        if isinstance(layer, OutputCast) and not narrow:
            return None
        last, dense = id(layer) in self.outputs, type(layer) in (keras.layers.Dense, layers.Dense, layers.Head)
        if narrow and last and not dense and not backend.inner_layers(layer):
            # What holds other layers is cast behind it instead: all that it computes need not be in float32.
            policy, narrow = keras.DTypePolicy("float32"), False
        cls = (_SAFE if narrow else _STOCK).get(type(layer), type(layer))
        if narrow and last and dense:
            cls = layers.Head
        arguments = {}
        activation = getattr(layer, "activation", None)
        twins = _SAFE_ACTIVATIONS if narrow else _STOCK_ACTIVATIONS
        if isinstance(activation, Hashable) and activation in twins:
            arguments["activation"] = twins[activation]
        penalty = layer.activity_regularizer
        if narrow and penalty is not None and not isinstance(penalty, Float32Regularizer):
            arguments["activity_regularizer"] = Float32Regularizer(penalty)
        elif not narrow and isinstance(penalty, Float32Regularizer):
            arguments["activity_regularizer"] = penalty.regularizer
        return Choice(cls, policy, arguments)

    def policy_for(self, layer: keras.Layer, path: str) -> keras.DTypePolicy:
        pinned = layer.compute_dtype not in (*_NARROW, "float32", self.model.compute_dtype)
        if pinned or layer.quantization_mode is not None:
            return layer.dtype_policy
        if isinstance(layer, self.stay):
            self.in_float32.add(path)
        parts = path.split("/")
        if any("/".join(parts[:depth]) in self.in_float32 for depth in range(1, len(parts) + 1)):
            return keras.DTypePolicy("float32")
        return self.wanted[path] if isinstance(self.wanted, keras.dtype_policies.DTypePolicyMap) else self.wanted

    def finish_outputs(self, outputs: Any) -> Any:
        if not any(map(_is_narrow, keras.tree.flatten(outputs))):
            return outputs
        # All of them, or the layers before some would come to lie deeper, and Keras lists weights by depth.
        casts: dict[int, OutputCast] = {}
        for output in keras.tree.flatten(outputs):
            maker = backend.origin(output)
            casts.setdefault(id(maker), OutputCast(name=f"{maker.name}_float32"))
        return keras.tree.map_structure(lambda output: casts[id(backend.origin(output))](output), outputs)

    def layers_that_answer(self, converted: keras.Model) -> set[int]:
        """Of a model whose graph is not known, the layers that have to compute in float32 for float32 outputs."""
        shapes = converted.get_build_config()
        found: set[int] = set()
        narrow = _narrow_answers(converted, shapes)
        originals = {id(copy): original for original, copy in self.rebuild.copies.items()}
        last = [each for inner in backend.inner_layers(converted) for each in _last_layers(inner)]
        tried: list[keras.Layer] = []
        for layer in reversed([each for each in last if not backend.inner_layers(each)]):
            if not narrow:
                break
            tried.append(layer)
            before = layer.dtype_policy
            layer.dtype_policy = keras.DTypePolicy("float32")
            fewer = _narrow_answers(converted, shapes)
            if fewer is not None and fewer < narrow:
                found |= {originals[id(each)] for each in tried}
                narrow, tried = fewer, []
            elif fewer is not None:
                layer.dtype_policy = before
                tried.remove(layer)
            # Otherwise its answer meets one of 16 bits, whose layer comes next.
        return found

    def culprit(self, error: BaseException | None) -> type | None:
        """The class of the innermost layer in whose call an error arose."""
        found = None
        while error is not None:
            for frame, _ in traceback.walk_tb(error.__traceback__):
                layer = frame.f_locals.get("self")
                if isinstance(layer, keras.Layer) and id(layer) in self.rebuild.paths:
                    found = type(layer)
            error = error.__cause__ or error.__context__
        return found


def _compile_alike(model: keras.Model, converted: keras.Model, rebuild: Rebuild, keeps_wrapper: bool = False) -> None:
    """Compiles the copy as the model was, and carries over the state of the optimizers."""
    if model.compiled:
        arguments = backend.compile_arguments(model)
        for name in ("metrics", "weighted_metrics"):
            arguments[name] = keras.tree.map_structure(_fresh_metric, arguments[name])
        arguments["optimizer"] = _carried(model.optimizer, model, converted, rebuild, keeps_wrapper)
        # A `compile` of the user's has set attributes, which are copied already.
        if isinstance(converted, Model):
            arguments["jit_compile"] = model.get_compile_config()["jit_compile"]
            Model.compile(converted, **arguments, auto_scale_loss=False)
        else:
            keras.Model.compile(converted, **arguments, auto_scale_loss=False)
    for owner, name, optimizer in rebuild.optimizers:
        setattr(owner, name, _carried(optimizer, model, converted, rebuild, keeps_wrapper))


def _carried(
    optimizer: keras.optimizers.Optimizer | None,
    original: keras.Model,
    model: keras.Model,
    rebuild: Rebuild,
    keeps_wrapper: bool = False,
) -> keras.optimizers.Optimizer | None:
    """A copy of an optimizer with its state, on the variables of the copy of a model, wrapped as that needs it."""
    if optimizer is None:
        return None
    wrapped = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if wrapped else optimizer
    outer = copy = _same_optimizer(inner)
    originals = {id(variable): variable for variable in (*original.variables, *inner._trainable_variables)}
    excluded, pattern = backend.excluded_from_weight_decay(inner, originals.values())
    if excluded or pattern:
        there = [rebuild.variables[id(variable)] for variable in excluded if id(variable) in rebuild.variables]
        copy.exclude_from_weight_decay(there, [pattern] if pattern else None)
    if wrapped if keeps_wrapper else needs_loss_scaling(model):
        if keeps_wrapper or isinstance(optimizer, LossScaleOptimizer):
            outer = type(optimizer)(**{**optimizer.get_config(), "inner_optimizer": copy})
        elif wrapped:
            outer = LossScaleOptimizer(copy, optimizer.initial_scale, optimizer.dynamic_growth_steps)
        else:
            outer = LossScaleOptimizer(copy)
    if inner.built:
        outer.build([rebuild.variables[id(variable)] for variable in inner._trainable_variables])
        _assign_state(copy, _state(inner))
        if wrapped and outer is not copy:
            _assign_state(outer, _state(optimizer, without=inner))
    return outer


def _assign_state(optimizer: keras.optimizers.Optimizer, values: list[keras.Variable]) -> None:
    """Gives an optimizer the state of another, which may list more variables or fewer.

    Keras's own wrapper has less state than ours, and inside a wrapper Keras does not list what some optimizers keep for
    variables that do not need it.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    variables = _state(optimizer, without=inner)
    if len(variables) != len(values):
        known = {(value.name, value.shape) for value in values}
        variables = [variable for variable in variables if (variable.name, variable.shape) in known]
        known = {(variable.name, variable.shape) for variable in variables}
        values = [value for value in values if (value.name, value.shape) in known]
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _same_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    config = optimizer.get_config()
    if isinstance(optimizer._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        config["learning_rate"] = optimizer._learning_rate  # it need not be one that Keras can make again
    return _made_again(optimizer, config)


def _state(optimizer: keras.optimizers.Optimizer, without: Any = None) -> list[keras.Variable]:
    """The variables of an optimizer, those included that it does not list, as the product of momenta of Nadam."""
    state = {id(variable): variable for variable in optimizer.variables}
    state |= {id(value): value for value in vars(optimizer).values() if isinstance(value, keras.Variable)}
    others = {id(variable) for variable in _state(without)} if without is not None else set()
    return [variable for key, variable in state.items() if key not in others]


def _fresh_metric(metric: Any) -> Any:
    return _made_again(metric, metric.get_config()) if isinstance(metric, keras.Metric) else metric


def _made_again(object: Any, config: dict[str, Any]) -> Any:
    """A metric or an optimizer like another."""
    try:
        return type(object).from_config(config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{object.name!r} of class {type(object).__name__} cannot be made again from its configuration: {error} "
            "Define `get_config`, and register functions with @keras.saving.register_keras_serializable()."
        ) from error


def _output_layers(model: keras.Layer) -> set[int]:
    """By `id`, the layers that make the outputs of a model, as far as its graph tells."""
    return {id(layer) for layer in _last_layers(model) if layer is not model}


def _last_layers(layer: keras.Layer) -> list[keras.Layer]:
    if isinstance(layer, keras.Sequential):
        return _last_layers(layer.layers[-1]) if layer.layers else []
    if isinstance(layer, backend.Functional):
        made = [backend.origin(output) for output in layer.outputs]
        made = [each for each in made if isinstance(each, keras.Layer)]
        # What only casts an output stands for the layer that makes it.
        return [last for each in made for last in _last_layers(each)]
    return [layer]


def _symbolic_outputs(model: keras.Model) -> list[Any]:
    try:
        return list(model.outputs)
    except AttributeError:  # a subclassed model, or one that is not built
        return []


def _narrow_answers(model: keras.Model, shapes: Any) -> int | None:
    """How many outputs of a model are 16-bit floats; None where the model cannot tell without data."""
    if not shapes:
        return None
    arguments = {"inputs": shapes["input_shape"]} if "input_shape" in shapes else shapes["shapes_dict"]
    try:
        symbols = [keras.tree.map_shape_structure(keras.KerasTensor, shape) for shape in arguments.values()]
        if "input_shape" in shapes:
            answers = model.compute_output_spec(*symbols)
        else:
            answers = model.compute_output_spec(
                **{name.removesuffix("_shape"): symbol for name, symbol in zip(arguments, symbols, strict=True)}
            )
    except Exception:  # what a model of the user's raises for inputs that it does not expect
        return None
    return sum(map(_is_narrow, keras.tree.flatten(answers)))


def _is_narrow(tensor: Any) -> bool:
    return hasattr(tensor, "dtype") and keras.backend.standardize_dtype(tensor.dtype) in _NARROW


def _what_it_says(error: Exception) -> str:
    """The kind of an error and what it says, without what Keras puts around it."""
    lines = [re.sub(r"\x1b\[\d*m", "", line).strip() for line in str(error).splitlines()]
    wrappings = ("Exception encountered when calling", "Could not automatically infer")
    lines = [line for line in lines if line and not line.startswith(wrappings)]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _warn(converted: keras.Model, wanted: keras.DTypePolicy, left: Mapping[type, str]) -> None:
    messages = []
    for cls, reason in left.items():
        paths = [path for path, layer in backend.layers_by_path(converted).items() if type(layer) is cls]
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        messages.append(
            f"{cls.__name__} fails in {wanted.compute_dtype}, so {paths[0]!r}{others} is left in float32. {reason} "
            "What a layer makes itself should be of its compute dtype, as keras.ops.ones(shape, "
            "dtype=self.compute_dtype), and within its range."
        )
    if _narrow_answers(converted, converted.get_build_config()) and not _symbolic_outputs(converted):
        messages.append(
            f"An output of {converted.name!r} is still a 16-bit float, for no layer makes it. Cast it in `call`: "
            'keras.ops.cast(output, "float32").'
        )
    if isinstance(wanted, PolicyMap):
        for pattern, close in wanted.unmatched(converted).items():
            hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
            messages.append(f"The pattern {pattern!r} matches no layer of {converted.name!r}.{hint}")
    for message in messages:
        warnings.warn(message, KerasMPWarning, stacklevel=stacklevel())


def _warn_of_slow_convolutions(model: keras.Model) -> None:
    """Warns of Keras's depthwise convolutions that take longer to train in bfloat16 than in float32 on a CPU."""
    slow = [
        path
        for path, layer in backend.layers_by_path(model).items()
        if type(layer) is keras.layers.DepthwiseConv2D
        and layer.compute_dtype == "bfloat16"
        and (max(layer.strides) > 1 or max(layer.kernel_size) > 3)
    ]
    if slow and backend.on_cpu():
        others = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        warnings.warn(
            f"{slow[0]!r}{others} in model {model.name!r}: on a CPU, Keras's DepthwiseConv2D takes longer to train in "
            "bfloat16 than in float32 where it has strides or a kernel larger than 3 x 3. Take "
            'keras_mp.layers.DepthwiseConv2D, or type model = keras_mp.convert(model, "mixed_bfloat16").',
            KerasMPWarning,
            stacklevel=stacklevel(),
        )


backend.call_before_training(_warn_of_slow_convolutions)
