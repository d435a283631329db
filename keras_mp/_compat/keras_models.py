"""Keras models: how they are built, called, compiled and run through as graphs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

# `keras.Model(inputs, outputs)` is an instance of this class, which has no public name to inherit from.
from keras.src.models.functional import Functional as Functional

# The rule that tells a functional model's arguments from others has no public name.
from keras.src.models.model import functional_init_arguments as _functional_init_arguments

from keras_mp._compat.keras_layers import layers_by_path

__all__ = [
    "Functional",
    "build",
    "call",
    "children",
    "compile_arguments",
    "compute_loss",
    "first_of_generator",
    "initial_epoch",
    "is_functional",
    "layers",
    "loss_and_metrics",
    "loss_tracker",
    "make_function",
    "origin",
    "preprocessing_classes",
    "run_through_graph",
    "seed_states",
    "set_initial_epoch",
    "sources",
    "without_remat",
]


def build(model: keras.Model, batch: Any) -> None:
    """Creates the missing variables that training a model needs, for data like this batch.

    Keras does so only under a strategy, and never in `predict`.

    Args:
        model: a Keras model.
        batch: `(x, y, sample_weight)`, or less, of tensors or arrays.
    """
    x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    if y is None:  # metrics and losses are for data that has labels
        model(keras.tree.map_structure(lambda value: keras.KerasTensor(value.shape, value.dtype), x))
    else:
        model._symbolic_build(data_batch=batch)


def call(model: keras.Model, *args: Any, training: bool, **kwargs: Any) -> Any:
    """Returns the model's outputs. It passes `training` if the model takes it, which no public name tells."""
    return model(*args, training=training, **kwargs) if model._call_has_training_arg else model(*args, **kwargs)


def compute_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
    """Returns `model.compute_loss(...)`, also if a subclass overrides it without the argument `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def first_of_generator(iterator: Any) -> Any:
    """Returns the first batch of a generator in `fit`, which Keras keeps without a public name, or None for other data.

    A batch that is taken from a generator's iterator cannot be put back, nor can the batches prefetched with it.

    Args:
        iterator: Keras's iterator over epochs.
    """
    batches = getattr(iterator.data_adapter, "_first_batches", None)
    return batches[0] if batches else None


def initial_epoch(model: keras.Model) -> int:
    """Returns the epoch that `BackupAndRestore` makes `fit` begin with. Keras keeps it under a private name alone."""
    return model._initial_epoch or 0


def set_initial_epoch(model: keras.Model, epoch: int) -> None:
    """Sets the epoch that `fit` begins with, as `BackupAndRestore` does."""
    model._initial_epoch = epoch


def is_functional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether these arguments of a model are the inputs and outputs of a functional one."""
    return bool(_functional_init_arguments(args, kwargs))


def make_function(model: keras.Model, step: Callable[[Any], Any]) -> Any:
    """Returns the function that `fit` and `evaluate` call for one or more batches.

    Keras makes it from `train_step` and `test_step`, and no public name takes another step.

    Args:
        model: a Keras model.
        step: gets a replica's data, returns its metrics.
    """
    return model._make_function(step)


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """Returns the states of a model's random generators. Keras lists them only among all its variables.

    Args:
        model: a Keras model.
    """
    layers = model._flatten_layers()
    return list({id(seed.state): seed.state for layer in layers for seed in layer._seed_generators}.values())


def origin(tensor: keras.KerasTensor) -> Any:
    """Returns the layer or operation whose output a symbolic tensor is."""
    return tensor._keras_history.operation


def sources(tensor: keras.KerasTensor) -> list[keras.KerasTensor]:
    """Returns the inputs from which a symbolic tensor is computed."""
    found: dict[int, keras.KerasTensor] = {}
    stack, seen = [tensor], set()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        history = each._keras_history
        node = history.operation._inbound_nodes[history.node_index]
        if node.input_tensors:
            stack.extend(node.input_tensors)
        else:
            found[id(each)] = each
    return list(found.values())


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Returns the given arguments of the model's `compile`. `get_compile_config` loses objects without a name."""
    return dict(model._compile_config.config)


def run_through_graph(
    model: keras.Model, inputs: Any, operation_of: Callable[[Any], Any], call: Callable[..., Any]
) -> Any:
    """Runs the graph of a Functional model with other operations.

    Args:
        model: a Functional model.
        inputs: symbolic tensors in the structure of `model.input`.
        operation_of: maps an operation of the graph to its replacement.
        call: gets the replacement and the arguments of its call.

    Returns:
        The outputs, in the structure of `model.output`.
    """
    return model._run_through_graph(inputs, operation_fn=operation_of, call_fn=call)


def preprocessing_classes() -> tuple[type, ...]:
    """Returns the classes of the layers that prepare data. Two of their base classes have no public name."""
    names = ("Rescaling", "StringLookup")
    bases = [getattr(keras.layers, name).__base__ for name in names]
    own = ("CategoryEncoding", "HashedCrossing", "Hashing", "MelSpectrogram", "Pipeline", "STFTSpectrogram")
    others = (keras.layers.TextVectorization, keras.utils.FeatureSpace)
    return (*bases, *others, *(getattr(keras.layers, name) for name in own))


# `keras.RematScope` sets an attribute without a public name. Rematerialization serves only a backward pass. In a graph,
# Keras's fails for a layer that is called with keywords.
@contextlib.contextmanager
def without_remat(model: keras.Model) -> Iterator[None]:
    """Inside, the layers and operations of a model are called without rematerialization.

    Args:
        model: a Keras model.
    """
    layers = layers_by_path(model).values()
    operations = {id(each): each for layer in layers for each in (layer, *getattr(layer, "operations", ()))}
    modes = {key: vars(each)["_remat_mode"] for key, each in operations.items() if vars(each).get("_remat_mode")}
    for key in modes:
        vars(operations[key])["_remat_mode"] = None
    try:
        yield
    finally:
        for key, mode in modes.items():
            vars(operations[key])["_remat_mode"] = mode


def layers(model: keras.Model) -> list[keras.Layer]:
    """Returns the model and all layers inside it, at any depth. The public `layers` lists the outermost only."""
    return list(model._flatten_layers())


def children(layer: keras.Layer) -> list[keras.Layer]:
    """Returns all layers inside a layer, at any depth, which no public name lists."""
    return list(layer._flatten_layers(include_self=False))


def loss_and_metrics(model: keras.Model) -> list[Any]:
    """Returns the compiled loss and the compiled metrics, where there are any; no public name holds them."""
    return [each for each in (model._compile_loss, model._compile_metrics) if each is not None]


def loss_tracker(model: keras.Model) -> keras.metrics.Mean:
    """Returns the metric that averages the loss over an epoch, which no public name holds."""
    return model._loss_tracker
