"""A copy of a Keras model in which any layer may have become another one, with all its variables' values.

Keras copies a model by making it again from its configuration. Many models of users have none, for they were given
layers as arguments; and what a layer makes in its own code comes out as it was. So here only layers that hold no
others, and those that become another class, are made from their configuration. What holds layers is copied attribute
by attribute, with each layer in it replaced by its copy.
"""

import collections
import contextlib
import functools
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from keras_mp import backend
from keras_mp.errors import ConversionError
from keras_mp.inserted import cast_losses, cast_outputs, inserted_attributes

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
        policy: the dtype policy.
        arguments: what to change in the configuration.
        output_dtype: the dtype that the outputs are cast to, or None for the layer's own.
        float32_losses: whether the losses that the layer adds are cast to float32.
    """

    cls: type[keras.Layer]
    policy: keras.DTypePolicy
    arguments: dict[str, Any] = field(default_factory=dict)
    output_dtype: str | None = None
    float32_losses: bool = False


class Rebuild:
    """Makes a copy of a model.

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
        optimizers: those that attributes hold, as (copy, name of the attribute, optimizer); they are not copied.
    """

    def __init__(
        self,
        choose: Callable[[keras.Layer, str], Choice | None],
        finish_outputs: Callable[[Any], Any] = lambda outputs: outputs,
        choose_operation: Callable[[Any, Any, Any, Any], Any] = lambda operation, copy, args, kwargs: copy,
    ) -> None:
        self.paths: dict[int, str] = {}
        self.variables: dict[int, keras.Variable] = {}
        self.optimizers: list[tuple[keras.Model, str, keras.optimizers.Optimizer]] = []
        self._choose, self._finish_outputs, self._choose_operation = choose, finish_outputs, choose_operation
        self.copies: dict[int, Any] = {}
        self._unpaired: list[tuple[keras.Layer, keras.Layer]] = []
        self._scope: list[str] = []

    def __call__(self, model: keras.Model) -> keras.Model:
        """The copy, not compiled, with the values of the model's variables.

        Args:
            model: a Functional, Sequential or subclassed model.

        Raises:
            ConversionError: a layer cannot be copied.
        """
        copy = self._copied(model, model.name, root=True)
        for old, new in self._unpaired:
            self._pair(old, new)
        return copy

    def _copied(self, layer: keras.Layer, path: str, root: bool = False) -> Any:
        if id(layer) in self.copies:
            return self.copies[id(layer)]
        choice = self._choose(layer, path)
        if choice is None:
            return None
        with _policy(choice.policy), self._scope_around(layer):
            copy = None
            if choice.cls is not type(layer) or not backend.inner_layers(layer):
                copy = self._from_configuration(layer, path, choice)
            if copy is None:
                copy = self._by_attributes(layer, path, choice, root)
        if choice.output_dtype is not None:
            cast_outputs(copy, choice.output_dtype)
        if choice.float32_losses:
            cast_losses(copy)
        self.copies[id(layer)] = copy
        self.paths[id(copy)] = path
        return copy

    @contextlib.contextmanager
    def _scope_around(self, layer: keras.Layer) -> Iterator[None]:
        """The name scope that the layer was built in, so that its copy and its variables have the same paths."""
        before, wanted = self._scope, (layer.path or "").split("/")[:-1]
        with contextlib.ExitStack() as stack:
            if wanted[: len(before)] == before:
                for name in wanted[len(before) :]:
                    stack.enter_context(keras.name_scope(name))
                self._scope = wanted
            yield
        self._scope = before

    def _from_configuration(self, layer: keras.Layer, path: str, choice: Choice) -> keras.Layer | None:
        config = _configuration(layer)
        if config is None:
            return None  # a class of the user's without one
        config |= choice.arguments
        if isinstance(layer, keras.layers.Lambda):
            return None  # whose Python code Keras makes again only where files are trusted
        if "dtype" in config:
            # As a file has it: made from an object, a layer without a `get_config` of its own cannot be saved again.
            config["dtype"] = keras.dtype_policies.serialize(choice.policy)
        # Layers that were given to the constructor are copied by us, not by Keras from their configuration.
        given = {key: getattr(layer, key) for key in config if _holds_layers(getattr(layer, key, None))}
        try:
            if given:
                config |= {key: self._value(value, path) for key, value in given.items()}
                if "dtype" in config:
                    config["dtype"] = choice.policy
                copy = choice.cls(**config)
            else:
                copy = choice.cls.from_config(config)
            if not given and copy.dtype_policy != choice.policy:
                copy.dtype_policy = choice.policy
            if layer.built and not copy.built:
                copy.build_from_config(layer.get_build_config())
        except (TypeError, ValueError, NotImplementedError, KeyError) as error:
            if choice.cls is type(layer):
                return None  # its configuration is not what its constructor takes
            raise ConversionError(
                f"{path!r} of class {type(layer).__name__} cannot be made again from its configuration: {error} "
                "Define `get_config` and `from_config`, or take the layer out of what is converted."
            ) from error
        if copy.built:
            self._pair(layer, copy)
        else:  # what calls it will build it
            self._unpaired.append((layer, copy))
        return copy

    def _by_attributes(self, layer: keras.Layer, path: str, choice: Choice, root: bool) -> keras.Layer:
        cls = type(layer)
        if isinstance(layer, keras.Sequential):
            copy = self._sequential(layer, path)
        elif isinstance(layer, backend.Functional):
            copy = self._functional(layer, path, root)
        else:
            copy = _unmade(cls)
            arguments = {"name": layer.name, "dtype": choice.policy}
            if isinstance(layer, keras.Model):
                keras.Model.__init__(copy, **arguments)
            else:
                regularizer = choice.arguments.get("activity_regularizer", layer.activity_regularizer)
                keras.layers.Layer.__init__(copy, activity_regularizer=regularizer, **arguments)
        self.copies[id(layer)] = copy  # before what is in it, which may refer to it
        self.paths[id(copy)] = path
        self._copy_attributes(layer, copy, path)
        return copy

    def _copy_attributes(self, layer: keras.Layer, copy: keras.Layer, path: str) -> None:
        of_keras, untracked = set(vars(copy)) | inserted_attributes(layer), _untracked(layer)
        for name, value in vars(layer).items():
            if name in _kept_by_libraries():
                continue
            if name not in of_keras:
                if isinstance(value, keras.optimizers.Optimizer):
                    self.optimizers.append((copy, name, value))
                elif name in untracked:
                    vars(copy)[name] = keras.tree.map_structure(_plain_copy, value)
                else:
                    setattr(copy, name, self._value(value, path, copy))
            elif isinstance(value, (bool, str, keras.layers.InputSpec, type(None))) or name == "_build_shapes_dict":
                setattr(copy, name, value)  # flags that a class may have set for itself
        arguments = backend.auto_config(layer)
        if arguments is not None and "dtype" in arguments:
            arguments["dtype"] = keras.dtype_policies.serialize(copy.dtype_policy)
        backend.set_auto_config(copy, arguments)

    def _sequential(self, model: keras.Sequential, path: str) -> keras.Sequential:
        copy = _unmade(type(model))
        layers = [self._copied(layer, f"{path}/{layer.name}") for layer in model.layers]
        layers = [layer for layer in layers if layer is not None]
        if model.built and getattr(model, "inputs", None):
            layers.insert(0, _input_like(model.inputs[0]))
        keras.Sequential.__init__(copy, layers, name=model.name)
        return copy

    def _functional(self, model: keras.Model, path: str, root: bool) -> keras.Model:
        inputs = keras.tree.map_structure(_input_like, model.input)
        operations: dict[int, Any] = {}

        def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(operation, keras.Layer):
                copied = self._copied(operation, f"{path}/{operation.name}")
                return (_same if copied is None else copied)(*args, **kwargs)
            if id(operation) not in operations:
                copied = _copied_operation(operation)
                operations[id(operation)] = self._choose_operation(operation, copied, args, kwargs)
            return operations[id(operation)](*args, **kwargs)

        outputs = backend.run_through_graph(model, inputs, lambda operation: operation, call)
        if root:
            outputs = self._finish_outputs(outputs)
        copy = _unmade(type(model))
        backend.Functional.__init__(copy, inputs=inputs, outputs=outputs, name=model.name)
        return copy

    def _value(self, value: Any, path: str, owner: keras.Layer | None = None) -> Any:
        """The copy of what an attribute holds. What neither is nor holds state of Keras stays the same object."""
        copied = functools.partial(self._value, path=path, owner=owner)
        if isinstance(value, keras.Layer):
            copy = self._copied(value, f"{path}/{value.name}")
            return _same if copy is None else copy
        if isinstance(value, keras.Variable):
            return self._variable(value, owner)
        if isinstance(value, keras.random.SeedGenerator):
            seeds = keras.random.SeedGenerator(0, name=value.name)
            seeds.state.assign(value.state)
            self.variables[id(value.state)] = seeds.state
            return seeds
        if isinstance(value, keras.Metric):
            metric = type(value).from_config(value.get_config())
            for old, new in zip(value.variables, metric.variables, strict=False):
                new.assign(old)
            return metric
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(copied, value))
        if isinstance(value, (list, tuple, set)):
            plain: Any = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
            return plain(map(copied, value))
        if isinstance(value, dict):
            kind = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
            return kind((key, copied(each)) for key, each in value.items())
        if isinstance(value, types.MethodType) and isinstance(value.__self__, keras.Layer):
            return types.MethodType(value.__func__, copied(value.__self__))
        if isinstance(value, types.FunctionType) and any(_holds_layers(cell) for cell in _enclosed(value)):
            cells = tuple(types.CellType(copied(cell)) for cell in _enclosed(value))
            function = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
            function.__kwdefaults__ = value.__kwdefaults__
            return function
        if isinstance(value, tf.types.experimental.PolymorphicFunction):
            function = copied(value.python_function)
            return value if function is value.python_function else tf.function(function)
        return value

    def _variable(self, variable: keras.Variable, owner: Any) -> keras.Variable:
        if id(variable) not in self.variables:
            is_float = keras.backend.is_float_dtype(variable.dtype)
            copy = owner.add_weight(
                name=variable.name,
                shape=variable.shape,
                initializer="zeros",
                dtype=owner.variable_dtype if is_float else variable.dtype,
                trainable=variable.trainable,
                autocast=backend.autocasts(variable),
                regularizer=variable.regularizer,
                constraint=variable.constraint,
                aggregation=variable.aggregation,
            )
            copy.assign(backend.uncast(variable))
            self.variables[id(variable)] = copy
        return self.variables[id(variable)]

    def _pair(self, old: keras.Layer, new: keras.Layer) -> None:
        """Gives a layer that was made from a configuration the state of the other."""
        for ours, theirs in ((new.weights, _in_order_of(new.weights, old.weights)), (_seeds(new), _seeds(old))):
            shapes = [[tuple(variable.shape) for variable in variables] for variables in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ConversionError(
                    f"{old.name!r} has variables of shapes {shapes[1]}, and {shapes[0]} when it is made "
                    f"again as {type(new).__name__}. Make all variables of {type(old).__name__} in `build`."
                )
            for variable, value in zip(ours, theirs, strict=True):
                variable.assign(backend.uncast(value))
                variable.trainable = value.trainable
                self.variables[id(value)] = variable
        there = _untracked(new)
        for name, states in _untracked(old).items():
            for variable, state in zip(there.get(name, ()), states, strict=False):
                variable.assign(backend.uncast(state))
        _copy_assets(old, new)


def _unmade(cls: Any) -> Any:
    """An instance whose constructor has not run."""
    return cls.__new__(cls)


@functools.cache
def _kept_by_libraries() -> frozenset[str]:
    """The attributes that `compile` and `fit`, and TensorFlow for its checkpoints, keep on a model for themselves.

    And the strategy: a copy is of the scope that it is made in.
    """
    # In float32 whatever the policy: nobody is to be warned of this model's optimizer.
    model = keras.Sequential([keras.Input((1,), dtype="float32"), keras.layers.Dense(1, dtype="float32")])
    before = dict(vars(model))
    model.compile("sgd", "mse", metrics=["mse"], jit_compile=False)
    compiled = {name for name, value in vars(model).items() if name not in before or before[name] is not value}
    of_tensorflow = {name for name in before if name.startswith("_self_")}
    functions = {"train_function", "test_function", "predict_function", "_forward_backward"}
    return frozenset(compiled | of_tensorflow | functions | {"_distribute_strategy"})


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


def _in_order_of(ours: list[keras.Variable], theirs: list[keras.Variable]) -> list[keras.Variable]:
    """Variables in the order of others of the same names, which quantization in float8 changes."""
    by_name = {variable.name: variable for variable in theirs}
    names = [variable.name for variable in ours]
    same = len(by_name) == len(theirs) and sorted(names) == sorted(by_name)
    return [by_name[name] for name in names] if same else theirs


def _untracked(layer: keras.Layer) -> dict[str, list[keras.Variable]]:
    """By attribute, the variables that a layer keeps out of its files, as a stateful recurrent one does its states."""
    kept = {id(variable) for variable in layer.variables}
    found = {}
    for name, value in vars(layer).items():
        if isinstance(value, (list, tuple)) and value and not name.startswith("_"):
            flat = keras.tree.flatten(value)
            if all(isinstance(each, keras.Variable) and id(each) not in kept for each in flat):
                found[name] = flat
    return found


def _plain_copy(variable: keras.Variable) -> keras.Variable:
    return keras.Variable(
        backend.uncast(variable), dtype=variable.dtype, trainable=variable.trainable, name=variable.name
    )


def _input_like(tensor: keras.KerasTensor) -> keras.KerasTensor:
    layer = backend.origin(tensor)
    return type(layer).from_config(layer.get_config()).output


def _copied_operation(operation: Any) -> Any:
    try:
        return type(operation).from_config(operation.get_config())
    except (NotImplementedError, TypeError, ValueError):
        return operation  # it has no state


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for a layer that is left out."""
    return x


def _holds_layers(value: Any) -> bool:
    return any(isinstance(each, keras.Layer) for each in keras.tree.flatten(value))


def _enclosed(function: types.FunctionType) -> list[Any]:
    """What a function has taken from around it."""
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _seeds(layer: keras.Layer) -> list[keras.Variable]:
    weights = {id(weight) for weight in layer.weights}
    return [variable for variable in layer.variables if id(variable) not in weights]


def _copy_assets(old: keras.Layer, new: keras.Layer) -> None:
    """Copies state that is not in variables, such as a vocabulary, and what is derived from variables."""
    if hasattr(old, "save_assets") and old.built:
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if hasattr(new, "finalize_state"):
        new.finalize_state()
