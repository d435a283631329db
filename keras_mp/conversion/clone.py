"""A copy of a Keras model in which any layer may have become another one, with all its variables' values.

Keras copies a model by making it again from its configuration. Many models of users have none, for they were given
layers as arguments; and a configuration has not all that a layer holds. So here the copy of a layer gets each of its
attributes, with each layer and variable in them replaced by its copy, and tracks the same ones in the same order. Only
layers that change their class, or the policy and hold no others, are made from their configuration before that.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_models
from keras_mp.conversion.copying import Copier, holds_state, items
from keras_mp.conversion.inserted import cast_losses, cast_outputs, inserted_attributes
from keras_mp.errors import ConversionError

__all__ = ["Choice", "Rebuild"]

# What a configuration holds by names. Plain functions, and those of TensorFlow and of `functools`.
_WITHOUT_NAMES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    functools.partial,
    tf.types.experimental.PolymorphicFunction,
    keras.Regularizer,
    keras.Initializer,
    keras.constraints.Constraint,
)


@dataclass(frozen=True)
class Choice:
    """What a layer becomes in the copy.

    Attributes:
        cls: the class, which takes the configuration of the layer that it replaces and has the same weights.
        policy: the dtype policy. A layer that is quantized stays so, from this policy where Keras does that.
        arguments: what to change in the configuration.
        output_dtype: the dtype that the outputs are cast to, or None for the layer's own.
        float32_losses: whether the losses that the layer adds are cast to float32.
    """

    cls: type[keras.Layer]
    policy: keras.DTypePolicy
    arguments: dict[str, Any] = field(default_factory=dict)
    output_dtype: str | None = None
    float32_losses: bool = False


class Rebuild(Copier):
    """Makes a copy of a model.

    A layer that Keras does not track, as one that was set by `object.__setattr__`, is copied as it is and not tracked
    either; where it is a part of the model as well, the copy of that part takes its place.

    Args:
        choose: from a layer and its path to what it becomes, or None to leave it out (a layer of one input and one
            output). A layer that is used in several places is asked for once.
        finish_outputs: from the symbolic outputs of a Functional model to those that take their place.
        choose_operation: from an operation of a Functional model's graph, its copy and the arguments of its call to
            what takes its place.

    Attributes:
        paths: the path of each layer of the copy, by the layer's `id`.
        variables: the variable of the copy, by the `id` of the model's.
        copies: the copy of each layer, by the `id` of the model's.
        optimizers: the attributes that hold some, as (layer, its copy, name), which `set_optimizers` sets.
        compiled: the models in the model that are compiled, as (model, copy). The copy is not.
    """

    def __init__(
        self,
        choose: Callable[[keras.Layer, str], Choice | None],
        finish_outputs: Callable[[Any], Any] = lambda outputs: outputs,
        choose_operation: Callable[[Any, Any, Any, Any], Any] = lambda operation, copy, args, kwargs: copy,
    ) -> None:
        super().__init__()
        self.paths: dict[int, str] = {}
        self.copies: dict[int, Any] = {}
        self.optimizers: list[tuple[keras.Layer, keras.Layer, str]] = []
        self.compiled: list[tuple[keras.Model, keras.Model]] = []
        self._choose, self._finish_outputs, self._choose_operation = choose, finish_outputs, choose_operation
        self._root: keras.Layer | None = None
        self._places: dict[int, str] = {}  # of the layers that the model tracks, by `id`

    def __call__(self, model: keras.Model) -> keras.Model:
        """The copy, not compiled, with the values of the model's variables.

        Args:
            model: a Functional, Sequential or subclassed model.

        Raises:
            ConversionError: a layer cannot be copied.
        """
        self._root = model
        self._places = {id(layer): path for layer, path in keras_layers.paths_of_layers(model)}
        return self.layer(model)

    def layer(self, layer: keras.Layer) -> Any:
        """The copy of a layer, or what stands in for one that is left out."""
        if id(layer) not in self.copies:
            self._copy(layer)
        copy = self.copies[id(layer)]
        return _same if copy is None else copy

    def set_optimizers(self, carry: Callable[[keras.optimizers.Optimizer], Any]) -> None:
        """Sets the attributes that hold optimizers, once all variables have their copies.

        Args:
            carry: from an optimizer to its copy.
        """
        self.carry = carry
        for layer, copy, name in self.optimizers:
            value = self.value(vars(layer)[name])
            if keras_layers.checkpointed(layer, name) or not isinstance(value, keras.optimizers.Optimizer):
                with keras_layers.unlocked(copy):
                    setattr(copy, name, value)
            else:
                vars(copy)[name] = value

    def symbol(self, tensor: keras.KerasTensor) -> Any:
        """The copy of a symbolic tensor, computed by the copies of the layers."""
        layer = keras_models.origin(tensor)
        if isinstance(layer, keras.layers.InputLayer):
            copy = _input_like(tensor)
            self.copies[id(layer)] = keras_models.origin(copy)
            return copy
        function = keras.Function(keras_models.sources(tensor), tensor)
        inputs = [self.value(each) for each in keras_models.sources(tensor)]
        return keras_models.run_through_graph(function, inputs, _itself, self._call)

    def _copy(self, layer: keras.Layer) -> None:
        path = self._places.get(id(layer))
        choice = Choice(type(layer), layer.dtype_policy) if path is None else self._choose(layer, path)
        if choice is None:
            self.copies[id(layer)] = None
            return
        choice = replace(choice, policy=_quantized_alike(layer.dtype_policy, choice.policy))
        with _policy(_unquantized(choice.policy)):
            copy = None
            changes = choice.cls is not type(layer)
            if changes or (choice.policy != layer.dtype_policy and not keras_layers.inner_layers(layer)):
                copy = self._from_configuration(layer, path or layer.name, choice)
            if copy is None:
                copy = self._by_attributes(layer, choice)
        if choice.output_dtype is not None:
            cast_outputs(copy, choice.output_dtype)
        if choice.float32_losses:
            cast_losses(copy)
        if path is not None:
            self.paths[id(copy)] = path
        if isinstance(layer, keras.Model) and layer.compiled:
            self.compiled.append((layer, copy))

    def _register(self, layer: keras.Layer, copy: keras.Layer) -> None:
        """Lets what is in a layer refer to its copy before that is complete."""
        self.copies[id(layer)] = copy
        self.remember(layer, copy)

    def _from_configuration(self, layer: keras.Layer, path: str, choice: Choice) -> keras.Layer | None:
        config = _configuration(layer)
        # Keras makes the Python code of a `Lambda` again only where files are trusted.
        if config is None or isinstance(layer, keras.layers.Lambda):
            return None
        # Layers that were given to the constructor are copied by us, not by Keras from their configuration.
        given = {key: getattr(layer, key) for key in config if _holds_layers(getattr(layer, key, None))}
        try:
            copies = {key: self.value(value) for key, value in given.items()}
            copy = _made(choice.cls, layer, config | choice.arguments, choice.policy, copies)
        except (TypeError, ValueError, NotImplementedError, KeyError) as error:
            if choice.cls is type(layer):
                return None  # its configuration is not what its constructor takes
            raise ConversionError(
                f"{path!r} of class {type(layer).__name__} cannot be made again from its configuration: {error} "
                "Define `get_config` and `from_config`, or take the layer out of what is converted."
            ) from error

        @functools.cache
        def unchanged() -> dict[str, Any]:
            """The attributes that the layer had when it was made, which tell later changes from what its class sets."""
            try:
                return {} if given else vars(_made(type(layer), layer, config, layer.dtype_policy, {}))
            except (TypeError, ValueError, NotImplementedError, KeyError):
                return {}

        self._register(layer, copy)
        self._join(layer, copy, choice, unchanged)
        return copy

    def _join(
        self, layer: keras.Layer, copy: keras.Layer, choice: Choice, unchanged: Callable[[], dict[str, Any]]
    ) -> None:
        """Gives a layer that was made from a configuration all that the other holds."""
        same = choice.cls is type(layer)
        there, made, of_keras = vars(layer), vars(copy), _of_every_layer()
        with self._attributes_of(layer, copy):
            for name, value in list(there.items()):
                if name in of_keras or name in choice.arguments or _is_for_libraries(layer, name):
                    continue
                joined = self._joined(value, made[name], unchanged, name) if name in made else self._held(value)
                self._set(layer, copy, name, joined)
        settings = keras_layers.own_settings(layer, of_keras if same else _OF_ANY_CLASS)
        for name, value in settings.items():
            _set_setting(copy, name, value)
        for name, value in list(made.items()):
            dropped = isinstance(value, keras.Variable) or same
            if name not in there and name not in of_keras and dropped and _tracks(copy, value):
                keras_layers.without_attribute(copy, name)
        own = [value for name, value in made.items() if name not in there and not same]
        others = {id(each) for value in own for each in items(value)}
        self._finish(layer, copy, lambda each: id(each) in others)
        keras_layers.set_dtype_policy(copy, choice.policy)
        if hasattr(copy, "finalize_state") and copy.built and copy.weights:
            copy.finalize_state()  # derives tensors of the compute dtype from weights

    def _joined(self, value: Any, made: Any, unchanged: Callable[[], dict[str, Any]], name: str) -> Any:
        """What an attribute becomes that the constructor or `build` of the copy has set as well."""
        if id(value) in self._made:
            return self.value(value)
        if isinstance(value, keras.Variable) and isinstance(made, keras.Variable) and _fits(value, made):
            self.adopt(value, made)
            return made
        if isinstance(value, keras.random.SeedGenerator) and isinstance(made, keras.random.SeedGenerator):
            self.adopt(value.state, made.state)
            made.name = value.name
            self.remember(value, made)
            return made
        if holds_state(value):
            if isinstance(value, (list, tuple)) and isinstance(made, (list, tuple)) and len(value) == len(made):
                for each, other in zip(value, made, strict=True):
                    self._joined(each, other, dict, "")
            return self.value(value)
        if _equal(value, made):
            return made
        before = unchanged()
        if name in before and _equal(value, before[name]):
            return made  # set by the class, for the policy that it has
        if isinstance(value, tf.Tensor) and isinstance(made, tf.Tensor) and made.dtype.is_floating:
            return tf.cast(value, made.dtype)
        return self.value(value)

    def _by_attributes(self, layer: keras.Layer, choice: Choice) -> keras.Layer:
        copy: Any = _unmade(type(layer))
        self._register(layer, copy)
        if isinstance(layer, keras.Sequential):
            self._sequential(layer, copy)
        elif isinstance(layer, keras_models.Functional):
            self._functional(layer, copy)
        else:
            arguments = {"name": layer.name, "dtype": choice.policy}
            if isinstance(layer, keras.Model):
                keras.Model.__init__(copy, **arguments)
            else:
                regularizer = choice.arguments.get("activity_regularizer", layer.activity_regularizer)
                keras.layers.Layer.__init__(copy, activity_regularizer=regularizer, **arguments)
        of_keras = set(vars(copy))
        with self._attributes_of(layer, copy):
            for name, value in list(vars(layer).items()):
                if _is_for_libraries(layer, name):
                    continue
                if name in choice.arguments and name != "activity_regularizer":
                    self._set(layer, copy, name, choice.arguments[name])
                elif name not in of_keras or (name in _set_by_compile() and value is not None):
                    self._set(layer, copy, name, self._held(value))
        for name, value in keras_layers.own_settings(layer, of_keras).items():
            _set_setting(copy, name, value)
        arguments = keras_layers.auto_config(layer)
        if arguments is not None and "dtype" in arguments:
            arguments["dtype"] = keras.dtype_policies.serialize(choice.policy)
        keras_layers.set_auto_config(copy, arguments)
        self._finish(layer, copy)
        return copy

    def _finish(self, layer: keras.Layer, copy: keras.Layer, keep: Callable[[Any], bool] = lambda each: False) -> None:
        if not isinstance(layer, (keras.Sequential, keras_models.Functional)):
            with self._attributes_of(layer, copy):
                self.track_alike(layer, copy, keep)
        keras_layers.lock_alike(layer, copy)

    @contextlib.contextmanager
    def _attributes_of(self, layer: keras.Layer, copy: keras.Layer) -> Iterator[None]:
        before = self._variable_dtypes
        # Of the policies: some preprocessing layers have dtypes of their own, which they know only when complete.
        self._variable_dtypes = (layer.dtype_policy.variable_dtype, copy.dtype_policy.variable_dtype)
        try:
            with keras_layers.unlocked(copy):
                yield
        finally:
            self._variable_dtypes = before

    def _held(self, value: Any) -> Any:
        return value if holds_state(value, keras.optimizers.Optimizer) else self.value(value)

    def _set(self, layer: keras.Layer, copy: keras.Layer, name: str, value: Any) -> None:
        """Sets an attribute, tracked if that of the original is."""
        original = vars(layer)[name]
        if holds_state(original, keras.optimizers.Optimizer):
            self.optimizers.append((layer, copy, name))
        elif _is_hidden(layer, name, original) or isinstance(inspect.getattr_static(copy, name, None), property):
            vars(copy)[name] = value
        else:
            setattr(copy, name, value)

    def _sequential(self, model: keras.Sequential, copy: keras.Sequential) -> None:
        layers = [self.layer(layer) for layer in model.layers]
        layers = [layer for layer in layers if layer is not _same]
        if model.built and getattr(model, "inputs", None):
            layers.insert(0, self.value(model.inputs[0]))
        keras.Sequential.__init__(copy, layers, name=model.name)

    def _functional(self, model: keras.Model, copy: keras.Model) -> None:
        inputs = keras.tree.map_structure(self.value, model.input)
        outputs = keras_models.run_through_graph(model, inputs, _itself, self._call)
        if model is self._root:
            outputs = self._finish_outputs(outputs)
        keras_models.Functional.__init__(copy, inputs=inputs, outputs=outputs, name=model.name)

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the copy of a layer or of an operation of a graph."""
        if isinstance(operation, keras.Layer):
            return self.layer(operation)(*args, **kwargs)
        if id(operation) not in self._made:
            copy = self._choose_operation(operation, _copied_operation(operation), args, kwargs)
            self.remember(operation, copy)
        return self.value(operation)(*args, **kwargs)


def _unmade(cls: Any) -> Any:
    """An instance whose constructor has not run."""
    return cls.__new__(cls)


# Attributes from `keras.Layer` that any class takes over from the one that it stands in for.
_OF_ANY_CLASS = ("_build_shapes_dict", "_called", "_parent_path", "_path", "_remat_mode", "_trainable", "built", "name")


@functools.cache
def _of_every_layer() -> frozenset[str]:
    return frozenset(vars(keras.layers.Layer(dtype="float32")))


@functools.cache
def _set_by_compile() -> frozenset[str]:
    """The attributes that `compile` sets on a model."""
    # In float32 whatever the policy: nobody is to be warned of this model's optimizer.
    model = keras.Sequential([keras.Input((1,), dtype="float32"), keras.layers.Dense(1, dtype="float32")])
    before = dict(vars(model))
    model.compile("sgd", "mse", metrics=["mse"], jit_compile=False)
    return frozenset(name for name, value in vars(model).items() if name not in before or before[name] is not value)


def _is_for_libraries(layer: keras.Layer, name: str) -> bool:
    """Whether an attribute is one that Keras or TensorFlow keeps on a layer for itself, and will set on a copy.

    And the strategy: a copy is of the scope that it is made in. And what `convert` has put around a layer's call.
    """
    functions = ("train_function", "test_function", "predict_function", "_forward_backward")
    if (
        name in keras_layers.names_of_tensorflow()
        or name == "_distribute_strategy"
        or name in inserted_attributes(layer)
    ):
        return True
    if not isinstance(layer, keras.Model):
        return False
    return name in functions or (layer.compiled and name in _set_by_compile()) or name in _OF_TRAINERS


# That a model which is not compiled has as well.
_OF_TRAINERS = ("_compile_loss", "_compile_metrics", "_loss_tracker", "compiled")


def _is_hidden(layer: keras.Layer, name: str, value: Any) -> bool:
    """Whether an attribute was set behind the back of Keras, so that what it holds is not tracked."""
    if type(value) in (list, dict, set):
        return True  # Keras would have made a list of its own of it
    kinds = (keras.Layer, keras.Variable, keras.Metric, keras.random.SeedGenerator)
    found = [each for each in items(value) if isinstance(each, kinds)]
    if found:
        return not any(_tracks(layer, each) for each in found)
    return isinstance(value, tf.__internal__.tracking.Trackable) and not keras_layers.checkpointed(layer, name)


def _tracks(layer: keras.Layer, value: Any) -> bool:
    """Whether a layer tracks one of the objects in a value."""
    known = {id(each) for store in keras_layers.tracked(layer).values() for each in store}
    return any(id(each) in known for each in items(value))


def _set_setting(copy: keras.Layer, name: str, value: Any) -> None:
    vars(copy)[name] = set(value) if isinstance(value, set) else dict(value) if isinstance(value, dict) else value


def _made(
    cls: Any, layer: keras.Layer, config: dict[str, Any], policy: keras.DTypePolicy, given: dict[str, Any]
) -> keras.Layer:
    """A layer made from the configuration of another, built if that is, and not quantized.

    Args:
        cls: its class.
        layer: the other.
        config: the configuration.
        policy: the dtype policy, of which the quantization is left out.
        given: layers that the configuration tells of and the constructor takes as they are.
    """
    policy = _unquantized(policy)
    if given:
        config = {**config, **given, **({"dtype": policy} if "dtype" in config else {})}
        made = cls(**config)
    else:
        # As a file has it: made from an object, a layer without a `get_config` of its own cannot be saved again.
        made = cls.from_config(
            {**config, **({"dtype": keras.dtype_policies.serialize(policy)} if "dtype" in config else {})}
        )
        if made.dtype_policy != policy:
            made.dtype_policy = policy
    if layer.built and not made.built:
        made.build_from_config(layer.get_build_config())
    return made


def _quantized_alike(policy: keras.DTypePolicy, wanted: keras.DTypePolicy) -> keras.DTypePolicy:
    """What a policy becomes where another is wanted: quantized as before, and from the wanted one.

    Args:
        policy: that of a layer, quantized or not.
        wanted: the other.

    Returns:
        `wanted` itself for a policy that is not quantized, and `policy` where Keras does not quantize from `wanted`.

    Example:

    >>> _quantized_alike(keras.dtype_policies.get("int8_from_float32"), keras.DTypePolicy("mixed_bfloat16")).name
    'int8_from_mixed_bfloat16'
    """
    if policy.quantization_mode is None or wanted.quantization_mode is not None:
        return wanted
    try:
        return type(policy).from_config({**policy.get_config(), "source_name": wanted.name})
    except ValueError:
        return policy


def _unquantized(policy: keras.DTypePolicy) -> keras.DTypePolicy:
    """The policy that a quantized one was made from."""
    if policy.quantization_mode is None:
        return policy
    return keras.DTypePolicy(policy.get_config()["source_name"])


def _fits(variable: keras.Variable, other: keras.Variable) -> bool:
    floats = [keras.backend.is_float_dtype(each.dtype) for each in (variable, other)]
    return tuple(variable.shape) == tuple(other.shape) and (all(floats) or variable.dtype == other.dtype)


def _equal(value: Any, other: Any) -> bool:
    """Whether two attributes without state are the same."""
    if value is other:
        return True
    if isinstance(value, (np.ndarray, tf.Tensor)) or isinstance(other, (np.ndarray, tf.Tensor)):
        same_kind = type(value) is type(other) and value.dtype == other.dtype and value.shape == other.shape
        return same_kind and bool(np.all(np.asarray(value) == np.asarray(other)))
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return type(value) is type(other) and value == other
    if isinstance(value, (list, tuple, set, dict)):
        try:
            return type(value) is type(other) and bool(value == other)
        except (ValueError, TypeError):  # of arrays
            return False
    return isinstance(value, keras.DTypePolicy)  # each has its own


@contextlib.contextmanager
def _policy(policy: keras.DTypePolicy) -> Iterator[None]:
    """What a layer makes in its own code without naming a policy gets the global one."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _configuration(layer: keras.Layer) -> dict[str, Any] | None:
    """What makes a layer again, with its functions and the like as they are; None where it has no `get_config`.

    Keras writes them down by their names, of which it knows only its own: another `gelu` would become Keras's.
    """
    try:
        config = dict(layer.get_config())
    except NotImplementedError:
        return None
    except (TypeError, ValueError):  # it holds what has no name
        shadow = _unmade(type(layer))
        vars(shadow).update(vars(layer))
        for name, value in vars(layer).items():
            if isinstance(value, _WITHOUT_NAMES):
                vars(shadow)[name] = keras.activations.linear
        try:
            config = dict(shadow.get_config())
        except (TypeError, ValueError, AttributeError):
            return None
    if type(layer).get_config is not keras.Layer.get_config:  # of which a file holds what it was given
        config |= {key: getattr(layer, key) for key in config if isinstance(getattr(layer, key, None), _WITHOUT_NAMES)}
    return config


def _input_like(tensor: keras.KerasTensor) -> keras.KerasTensor:
    layer = keras_models.origin(tensor)
    return type(layer).from_config(layer.get_config()).output


def _copied_operation(operation: Any) -> Any:
    try:
        copy = type(operation).from_config(operation.get_config())
    except (NotImplementedError, TypeError, ValueError):
        return operation  # it has no state
    for name, value in keras_layers.own_settings(operation, ["_remat_mode"]).items():
        setattr(copy, name, value)
    return copy


def _itself(operation: Any) -> Any:
    return operation


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a layer that is left out."""
    return x


def _holds_layers(value: Any) -> bool:
    return any(isinstance(each, keras.Layer) for each in items(value))
