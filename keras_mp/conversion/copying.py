"""Copies of the objects that layers hold, each made once, so that what was one object is one in the copy.

A copy shares no state with its original. Variables, seed generators, metrics, optimizers and tables are made again with
their values. So is each list, dict, function or object that leads to one. All else stays the same object.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers, keras_optimizers, keras_variables

__all__ = ["Copier", "holds_state", "items"]

_TABLES = (tf.lookup.experimental.MutableHashTable, tf.lookup.experimental.DenseHashTable)
_STATE = (
    keras.Layer,
    keras.Variable,
    keras.KerasTensor,
    keras.Metric,
    keras.optimizers.Optimizer,
    keras.random.SeedGenerator,
    tf.Variable,
    tf.random.Generator,
    *_TABLES,
)
# Objects of these packages that are not named above hold no state of a model, and some refer to half of the process.
_FOREIGN = ("tensorflow", "numpy", "builtins", "threading", "logging")


def holds_state(value: Any, kinds: "type | tuple[type, ...]" = _STATE) -> bool:
    """Whether an object is of some classes or leads to one that is: by items, attributes, closures or arguments.

    The search ends at an object with state: a layer does not lead to the parts of its parent.

    Args:
        value: any object.
        kinds: the classes. Defaults to all that hold state of a model.

    Example:

    >>> layer = keras.layers.Dense(1)
    >>> holds_state({"a": [functools.partial(layer, training=True)]}), holds_state([1, "a"])
    (True, False)
    """
    seen: set[int] = set()
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, kinds):
            return True
        if id(each) not in seen and not isinstance(each, _STATE):
            seen.add(id(each))
            stack.extend(_parts(each))
    return False


def items(value: Any) -> Iterator[Any]:
    """The objects in nested lists, tuples, sets and dicts of any keys, or an object itself."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from items(each)
    else:
        yield value


class Copier:
    """Makes copies. A layer is copied as a subclass says.

    Attributes:
        variables: the copy of each variable, by the `id` of the original.
        carry: from an optimizer to its copy. Defaults to one of the same class and state.
    """

    def __init__(self) -> None:
        self.variables: dict[int, keras.Variable] = {}
        self.carry: Callable[[Any], Any] = self.optimizer
        self._made: dict[int, tuple[Any, Any]] = {}  # with the original, whose `id` must not be given to another
        # The dtype of variables of the layer whose attributes are copied, there and here.
        self._variable_dtypes = ("", "")

    def value(self, value: Any) -> Any:
        """The copy of an object, or the object itself where it holds no state.

        Args:
            value: any object. Lists, dicts, sets and arrays are always copied.
        """
        if id(value) in self._made:
            return self._made[id(value)][1]
        make = self._maker_of(value)
        if make is None:
            return value
        copy = make(value)
        self.remember(value, copy)
        return copy

    def remember(self, original: Any, copy: Any) -> None:
        """Makes `value` return this copy of that original."""
        self._made[id(original)] = (original, copy)
        if isinstance(original, keras.Variable):
            self.variables[id(original)] = copy

    def layer(self, layer: keras.Layer) -> Any:
        """The copy of a layer."""
        raise NotImplementedError

    def symbol(self, tensor: keras.KerasTensor) -> Any:
        """The copy of a symbolic tensor."""
        return tensor

    def _maker_of(self, value: Any) -> "Callable[[Any], Any] | None":
        kinds: list[tuple[Any, Callable[[Any], Any]]] = [
            (keras.Layer, self.layer),
            (keras.Variable, self._variable),
            (keras.KerasTensor, self.symbol),
            (keras.optimizers.Optimizer, lambda optimizer: self.carry(optimizer)),
            ((keras.Metric, keras.random.SeedGenerator), self.object),
            (tf.Variable, _tensorflow_variable),
            (tf.random.Generator, lambda each: tf.random.Generator.from_state(each.state, each.algorithm)),
            (_TABLES, keras_layers.copy_of_table),
            (np.ndarray, np.copy),
            ((list, set, dict), self._container),
        ]
        found = next((make for kind, make in kinds if isinstance(value, kind)), None)
        if found is not None:
            return found
        if not holds_state(value):
            return None
        kinds = [
            (tuple, self._tuple),
            (types.FunctionType, self._function),
            (types.MethodType, lambda each: types.MethodType(each.__func__, self.value(each.__self__))),
            (functools.partial, self._partial),
            (tf.types.experimental.PolymorphicFunction, lambda each: tf.function(self.value(each.python_function))),
            (weakref.ref, lambda each: weakref.ref(self.value(each()))),
        ]
        return next((make for kind, make in kinds if isinstance(value, kind)), self.object)

    def _variable(self, variable: keras.Variable) -> keras.Variable:
        there, here = self._variable_dtypes
        copy = keras.Variable(
            keras_variables.uncast(variable),
            dtype=here if variable.dtype == there else variable.dtype,
            trainable=variable.trainable,
            autocast=keras_variables.autocasts(variable),
            aggregation=variable.aggregation,
            name=variable.name,
        )
        self.adopt(variable, copy, has_value=True)
        return copy

    def adopt(self, variable: keras.Variable, copy: keras.Variable, has_value: bool = False) -> None:
        """Takes a variable that exists for the copy of another, and gives it all that the other has but the dtype.

        Args:
            variable: the original.
            copy: a variable of that shape.
            has_value: whether it has the value already.
        """
        if not has_value:
            with keras_variables.without_autocast():
                copy.assign(keras_variables.uncast(variable))
        copy.trainable = variable.trainable
        copy.regularizer, copy.constraint = variable.regularizer, variable.constraint
        copy.overwrite_with_gradient = variable.overwrite_with_gradient
        keras_variables.set_path(copy, variable.path)
        self.remember(variable, copy)

    def object(self, value: Any) -> Any:
        """The copy of an object, attribute by attribute. Its constructor does not run."""
        try:
            copy = object.__new__(type(value))
        except TypeError:
            return value  # of a class in C that must be constructed
        self.remember(value, copy)
        watched = isinstance(value, (keras.Metric, keras.optimizers.Optimizer, tf.Module))
        for name, each in _attributes(value).items():
            if name in keras_layers.names_of_tensorflow():
                continue  # what TensorFlow tracks, which it finds again by `setattr`
            copied = keras_layers.tracker_like(each, self.value) if keras_layers.is_tracker(each) else self.value(each)
            if watched:
                setattr(copy, name, copied)
                copied = vars(copy).get(name, copied)  # wrapped by Keras or TensorFlow
            else:
                object.__setattr__(copy, name, copied)
            if id(each) in self._made:
                self.remember(each, copied)
        if watched:
            self.track_alike(value, copy)
        return copy

    def optimizer(self, optimizer: keras.optimizers.Optimizer) -> Any:
        """The copy of an optimizer with all its state, on the copies of its variables."""
        copy = self.object(optimizer)
        originals = [original for original, _ in self._made.values() if isinstance(original, keras.Variable)]
        keras_optimizers.renumber(optimizer, copy, originals, self.value)
        return copy

    def track_alike(self, original: Any, copy: Any, keep: Callable[[Any], bool] = lambda each: False) -> None:
        """Makes the copy track the copies of the original's tracked objects, in that order.

        Args:
            original: a layer, a metric or an optimizer.
            copy: its copy.
            keep: whether the copy goes on to track something that it tracks and the original does not.
        """
        there, here = keras_layers.tracked(original), keras_layers.tracked(copy)
        for store, items in there.items():
            copies = [self.value(item) for item in items]
            known = set(map(id, copies))
            others = [item for item in here[store] if id(item) not in known and keep(item)]
            keras_layers.set_tracked(copy, store, copies + others)

    def _container(self, value: Any) -> Any:
        kind: Any = dict if isinstance(value, dict) else set if isinstance(value, set) else list
        own = not isinstance(value, kind) or type(value).__module__.startswith(("keras.", "tensorflow."))
        try:
            # A subclass of the user's, or a `defaultdict`. Those that Keras and TensorFlow make are made again by them.
            copy = kind() if own or type(value) is kind else value.copy()
            copy.clear()
        except (AttributeError, TypeError):
            copy = kind()
        self.remember(value, copy)
        if isinstance(value, dict):
            copy.update((self.value(key), self.value(each)) for key, each in value.items())
        elif isinstance(value, set):
            copy.update(map(self.value, value))
        else:
            copy.extend(map(self.value, value))
        return copy

    def _tuple(self, value: Any) -> Any:
        copies = [self.value(each) for each in value]
        kind: Any = value.__class__  # also where TensorFlow has put a wrapper around it
        return kind(*copies) if hasattr(value, "_fields") else kind(copies)

    def _function(self, value: types.FunctionType) -> Any:
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        function = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        self.remember(value, function)  # before its cells: one of them may hold it
        for cell, there in zip(cells, value.__closure__ or (), strict=True):
            with_value = _content(there)
            if with_value:
                cell.cell_contents = self.value(with_value[0])
        function.__defaults__ = self.value(value.__defaults__)
        function.__kwdefaults__ = self.value(value.__kwdefaults__)
        vars(function).update(vars(value))
        return function

    def _partial(self, value: functools.partial) -> Any:
        keywords = {name: self.value(each) for name, each in value.keywords.items()}
        return functools.partial(self.value(value.func), *map(self.value, value.args), **keywords)


def _parts(value: Any) -> Iterator[Any]:
    """The objects that an object refers to, as far as they may lead to state."""
    if isinstance(value, (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, np.ndarray)):
        return
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, types.FunctionType):
        yield from (each for cell in value.__closure__ or () for each in _content(cell))
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
    elif isinstance(value, types.MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, tf.types.experimental.PolymorphicFunction):
        yield value.python_function
    elif isinstance(value, weakref.ref):
        yield value()
    elif type(value).__module__.split(".")[0] not in _FOREIGN:
        yield from _attributes(value).values()


def _content(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # a variable of the function around it that has no value yet
        return []


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", None) or {})
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def _tensorflow_variable(variable: tf.Variable) -> tf.Variable:
    return tf.Variable(
        tf.convert_to_tensor(variable),
        dtype=variable.dtype,
        trainable=variable.trainable,
        name=variable.name.partition(":")[0],
        aggregation=variable.aggregation,
        shape=variable.shape,
    )
