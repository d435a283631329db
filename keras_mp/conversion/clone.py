"""A copy of a Keras model in which any layer may have become another one, with all its variables' values.

Keras copies a model by making it again from its configuration. Many models have none, because they were given layers
as arguments, and a configuration does not hold all that a layer holds. So here a copy gets each attribute of the layer.
Layers and variables in an attribute are replaced by their copies, and are tracked in the same order. Some layers are
made from their configuration before that: those that change their class, or their policy while they hold no others.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_attributes, keras_layers, keras_models
from keras_mp.conversion.attributes import equal, fits, is_for_libraries, is_hidden, set_setting, tracks
from keras_mp.conversion.casts import cast_losses, cast_outputs
from keras_mp.conversion.configuration import configuration, made_alike, quantized_alike, unmade, unquantized
from keras_mp.conversion.copying import Copier, holds_state, items
from keras_mp.errors import ConversionError

__all__ = ["Choice", "Rebuild"]


@dataclass(frozen=True)
class Choice:
    """The layer that takes the place of another in the copy.

    Attributes:
        cls: the class. It takes the configuration of the replaced layer and has the same weights.
        policy: the dtype policy. A quantized layer stays quantized, from this policy where Keras can do that.
        arguments: changes of the configuration.
        output_dtype: the dtype to cast the outputs to, or None for no cast.
        float32_losses: whether to cast the losses that the layer adds to float32.
    """

    cls: type[keras.Layer]
    policy: keras.DTypePolicy
    arguments: dict[str, Any] = field(default_factory=dict)
    output_dtype: str | None = None
    float32_losses: bool = False


class Rebuild(Copier):
    """Makes a copy of a model.

    A layer that Keras does not track, such as one set by `object.__setattr__`, is copied as it is and stays untracked.
    If it is also a part of the model, the copy of that part takes its place.

    Args:
        choose: takes a layer and its path and returns its choice, or None to leave the layer out. A layer that is left
            out has one input and one output. It is called once for a layer that is used in several places.
        finish_outputs: takes the symbolic outputs of a Functional model and returns their replacements.
        choose_operation: takes an operation of a Functional model's graph, its copy and the arguments of its call, and
            returns the replacement.

    Attributes:
        paths: the path of each layer of the copy, by the layer's `id`.
        variables: the copy of each variable, by the `id` of the original.
        copies: the copy of each layer, by the `id` of the original.
        optimizers: the attributes that hold optimizers, as (layer, its copy, name). `set_optimizers` sets them.
        compiled: the compiled models inside the model, as (model, copy). The copies are not compiled.
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
        """Returns the copy with the values of the model's variables. It is not compiled.

        Args:
            model: a Functional, Sequential or subclassed model.

        Raises:
            ConversionError: a layer cannot be copied.
        """
        self._root = model
        self._places = {id(layer): path for layer, path in keras_layers.paths_of_layers(model)}
        return self.layer(model)

    def layer(self, layer: keras.Layer) -> Any:
        """Returns the copy of a layer, or the identity for a layer that is left out."""
        if id(layer) not in self.copies:
            self._copy(layer)
        copy = self.copies[id(layer)]
        return _same if copy is None else copy

    def set_optimizers(self, carry: Callable[[keras.optimizers.Optimizer], Any]) -> None:
        """Sets the attributes that hold optimizers, once all variables have their copies.

        Args:
            carry: takes an optimizer and returns its copy.
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
        """Returns the copy of a symbolic tensor, computed by the copies of the layers."""
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
        choice = replace(choice, policy=quantized_alike(layer.dtype_policy, choice.policy))
        with _policy(unquantized(choice.policy)):
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
        """Lets the parts of a layer refer to its copy before that is complete."""
        self.copies[id(layer)] = copy
        self.remember(layer, copy)

    def _from_configuration(self, layer: keras.Layer, path: str, choice: Choice) -> keras.Layer | None:
        config = configuration(layer)
        # Keras makes the Python code of a `Lambda` again only where files are trusted.
        if config is None or isinstance(layer, keras.layers.Lambda):
            return None
        # Layers that were given to the constructor are copied by us, not by Keras from their configuration.
        given = {key: getattr(layer, key) for key in config if _holds_layers(getattr(layer, key, None))}
        try:
            copies = {key: self.value(value) for key, value in given.items()}
            copy = made_alike(choice.cls, layer, config | choice.arguments, choice.policy, copies)
        except (TypeError, ValueError, NotImplementedError, KeyError) as error:
            if choice.cls is type(layer):
                return None  # its configuration is not what its constructor takes
            raise ConversionError(
                f"{path!r} of class {type(layer).__name__} cannot be made again from its configuration: {error} "
                "Define `get_config` and `from_config`, or take the layer out of what is converted."
            ) from error

        @functools.cache
        def unchanged() -> dict[str, Any]:
            """Returns the attributes as its class sets them, to tell later changes from them."""
            try:
                return {} if given else vars(made_alike(type(layer), layer, config, layer.dtype_policy, {}))
            except (TypeError, ValueError, NotImplementedError, KeyError):
                return {}

        self._register(layer, copy)
        self._join(layer, copy, choice, unchanged)
        return copy

    def _join(
        self, layer: keras.Layer, copy: keras.Layer, choice: Choice, unchanged: Callable[[], dict[str, Any]]
    ) -> None:
        """Gives a layer that was made from a configuration the attributes of the other."""
        same = choice.cls is type(layer)
        there, made, of_keras = vars(layer), vars(copy), keras_attributes.names_of_layers()
        with self._attributes_of(layer, copy):
            for name, value in list(there.items()):
                if name in of_keras or name in choice.arguments or is_for_libraries(layer, name):
                    continue
                joined = self._joined(value, made[name], unchanged, name) if name in made else self._held(value)
                self._set(layer, copy, name, joined)
        settings = keras_layers.own_settings(layer, of_keras if same else keras_attributes.names_of_any_class())
        for name, value in settings.items():
            set_setting(copy, name, value)
        for name, value in list(made.items()):
            dropped = isinstance(value, keras.Variable) or same
            if name not in there and name not in of_keras and dropped and tracks(copy, value):
                keras_layers.without_attribute(copy, name)
        own = [value for name, value in made.items() if name not in there and not same]
        others = {id(each) for value in own for each in items(value)}
        self._finish(layer, copy, lambda each: id(each) in others)
        keras_layers.set_dtype_policy(copy, choice.policy)
        if hasattr(copy, "finalize_state") and copy.built and copy.weights:
            copy.finalize_state()  # derives tensors of the compute dtype from weights

    def _joined(self, value: Any, made: Any, unchanged: Callable[[], dict[str, Any]], name: str) -> Any:
        """Returns the value of an attribute that the constructor or `build` of the copy has set as well."""
        if id(value) in self._made:
            return self.value(value)
        if isinstance(value, keras.Variable) and isinstance(made, keras.Variable) and fits(value, made):
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
        if equal(value, made):
            return made
        before = unchanged()
        if name in before and equal(value, before[name]):
            return made  # set by the class, for the policy that it has
        if isinstance(value, tf.Tensor) and isinstance(made, tf.Tensor) and made.dtype.is_floating:
            return tf.cast(value, made.dtype)
        return self.value(value)

    def _by_attributes(self, layer: keras.Layer, choice: Choice) -> keras.Layer:
        copy: Any = unmade(type(layer))
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
                if is_for_libraries(layer, name):
                    continue
                if name in choice.arguments and name != "activity_regularizer":
                    self._set(layer, copy, name, choice.arguments[name])
                elif name not in of_keras or (name in keras_attributes.names_set_by_compile() and value is not None):
                    self._set(layer, copy, name, self._held(value))
        for name, value in keras_layers.own_settings(layer, of_keras).items():
            set_setting(copy, name, value)
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
        # Read off the policies: some preprocessing layers know their own dtypes only when they are complete.
        self._variable_dtypes = (layer.dtype_policy.variable_dtype, copy.dtype_policy.variable_dtype)
        try:
            with keras_layers.unlocked(copy):
                yield
        finally:
            self._variable_dtypes = before

    def _held(self, value: Any) -> Any:
        return value if holds_state(value, keras.optimizers.Optimizer) else self.value(value)

    def _set(self, layer: keras.Layer, copy: keras.Layer, name: str, value: Any) -> None:
        """Sets an attribute. It is tracked if the original tracks it."""
        original = vars(layer)[name]
        if holds_state(original, keras.optimizers.Optimizer):
            self.optimizers.append((layer, copy, name))
        elif is_hidden(layer, name, original) or isinstance(inspect.getattr_static(copy, name, None), property):
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

    def _call(self, operation: keras.Operation, *args: Any, **kwargs: Any) -> Any:
        """Calls the copy of a layer or of an operation of a graph."""
        if isinstance(operation, keras.Layer):
            return self.layer(operation)(*args, **kwargs)
        if id(operation) not in self._made:
            copy = self._choose_operation(operation, _copied_operation(operation), args, kwargs)
            self.remember(operation, copy)
        return self.value(operation)(*args, **kwargs)


def _input_like(tensor: keras.KerasTensor) -> keras.KerasTensor:
    layer = keras_models.origin(tensor)
    return type(layer).from_config(layer.get_config()).output


def _copied_operation(operation: keras.Operation) -> keras.Operation:
    try:
        copy = type(operation).from_config(operation.get_config())
    except (NotImplementedError, TypeError, ValueError):
        return operation  # it has no state
    for name, value in keras_layers.own_settings(operation, ["_remat_mode"]).items():
        setattr(copy, name, value)
    return copy


def _itself(operation: keras.Operation) -> keras.Operation:
    return operation


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of a layer that is left out."""
    return x


@contextlib.contextmanager
def _policy(policy: keras.DTypePolicy) -> Iterator[None]:
    """Sets the global policy, which a layer's own code gives to the layers that it makes without naming one."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _holds_layers(value: Any) -> bool:
    return any(isinstance(each, keras.Layer) for each in items(value))
