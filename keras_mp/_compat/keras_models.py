"""Keras models: how they are built, called, compiled and run through as graphs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras

# `keras.Model(inputs, outputs)` is an instance of this class, which has no public name to inherit from.
from keras.src.models.functional import Functional as Functional

# The rule by which arguments of a model are those of a functional one.
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
    "is_functional",
    "layers",
    "loss_and_metrics",
    "loss_tracker",
    "make_function",
    "origin",
    "preprocessing_classes",
    "run_through_graph",
    "seed_states",
    "sources",
    "without_remat",
]


def build(model: keras.Model, batch: Any) -> None:
    """Creates all the variables that training a model needs and that do not exist yet, for data like this batch.

    Keras does so under a strategy only, and in `predict` never.

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
    """The model's outputs, told whether it trains if it wants to know, which no public name says."""
    return model(*args, training=training, **kwargs) if model._call_has_training_arg else model(*args, **kwargs)


def compute_loss(model: keras.Model, x: Any, y: Any, y_pred: Any, sample_weight: Any, training: bool) -> Any:
    """`model.compute_loss`, also where a subclass overrides it without the argument `training`."""
    return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)


def first_of_generator(iterator: Any) -> Any:
    """The first batch of a generator that `fit` was given, which Keras keeps without a public name; None of other data.

    A batch that is taken from the iterator of a generator, and those fetched ahead with it, cannot be put back.

    Args:
        iterator: Keras's iterator over epochs.
    """
    batches = getattr(iterator.data_adapter, "_first_batches", None)
    return batches[0] if batches else None


def is_functional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a model are the inputs and outputs of a functional one."""
    return bool(_functional_init_arguments(args, kwargs))


def make_function(model: keras.Model, step: Callable[[Any], Any]) -> Any:
    """What `fit` and `evaluate` call for each batch, or several, of a step on one replica.

    Keras makes it of `train_step` and `test_step` as they are, and no public name takes another step.

    Args:
        model: a Keras model.
        step: gets a replica's data, answers with its metrics.
    """
    return model._make_function(step)


def seed_states(model: keras.Model) -> list[keras.Variable]:
    """The states of a model's random generators; Keras lists them among all its variables only.

    Args:
        model: a Keras model.
    """
    layers = model._flatten_layers()
    return list({id(seed.state): seed.state for layer in layers for seed in layer._seed_generators}.values())


def origin(tensor: keras.KerasTensor) -> Any:
    """The layer, or the operation without variables, that a symbolic tensor is the answer of."""
    return tensor._keras_history.operation


def sources(tensor: keras.KerasTensor) -> list[keras.KerasTensor]:
    """The inputs that a symbolic tensor is computed from."""
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
    """The arguments of the model's `compile`, as they were given; `get_compile_config` has lost what has no name."""
    return dict(model._compile_config.config)


def run_through_graph(
    model: keras.Model, inputs: Any, operation_of: Callable[[Any], Any], call: Callable[..., Any]
) -> Any:
    """Runs the graph of a Functional model with other operations.

    Args:
        model: a Functional model.
        inputs: symbolic tensors in the structure of `model.input`.
        operation_of: from an operation of the graph to the one that stands in for it.
        call: gets that one and the arguments of its call.

    Returns:
        The outputs, in the structure of `model.output`.
    """
    return model._run_through_graph(inputs, operation_fn=operation_of, call_fn=call)


def preprocessing_classes() -> tuple[type, ...]:
    """The classes of the layers that prepare data, of which two common bases have no public name."""
    names = ("Rescaling", "StringLookup")
    bases = [getattr(keras.layers, name).__base__ for name in names]
    own = ("CategoryEncoding", "HashedCrossing", "Hashing", "MelSpectrogram", "Pipeline", "STFTSpectrogram")
    others = (keras.layers.TextVectorization, keras.utils.FeatureSpace)
    return (*bases, *others, *(getattr(keras.layers, name) for name in own))


# Keras has no public name for what `keras.RematScope` leaves on a layer. Recomputing is for a backward pass, and in a
# graph Keras's fails for a layer that is called by keywords.
@contextlib.contextmanager
def without_remat(model: keras.Model) -> Iterator[None]:
    """Calls the layers and operations of a model without recomputing anything.

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
