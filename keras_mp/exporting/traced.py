"""The graph of an export: a model traced for each signature, over variables of its own."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import keras_layers, runtime
from keras_mp.errors import ExportError
from keras_mp.exporting import blame
from keras_mp.exporting.formats.operations import widen_constants
from keras_mp.exporting.sample import made_up
from keras_mp.exporting.signature import Names, Signature, as_array, by_name, signature_of, widened
from keras_mp.exporting.storage import Storage, half_of, narrow_dtypes, resources_of, with_precision
from keras_mp.policies.policy import compute_dtypes

__all__ = ["Graph", "trace"]


@dataclasses.dataclass(frozen=True)
class Graph:
    """What is going to be written.

    Attributes:
        models: the models as they were trained, by the name of their signature; the first is `serving_default`.
        signatures: how each is called.
        functions: each traced, with the dtypes that are served.
        forwards: for each the model whose layers compute, and what calls it with the weights that are stored.
        own_outputs: the names that their outputs would have if the user had given none.
        precision: "float32" or "mixed".
        products: the dtypes that the layers compute in.
        half: the dtype of half-size weights, or None.
        stored: the path of each variable, in the order in which they are written.
        kept: paths of those that could not be held in half size.
        jit_compile: whether XLA must compile it.
        module: the object to save.
    """

    models: dict[str, keras.Model]
    signatures: dict[str, Signature]
    functions: dict[str, Any]
    forwards: dict[str, tuple[keras.Model, Callable[[Any], Any]]]
    own_outputs: dict[str, list[str]]
    precision: str
    products: frozenset[str]
    half: str | None
    stored: list[str]
    kept: list[str]
    jit_compile: bool
    module: tf.Module

    @property
    def dtypes(self) -> set[str]:
        """What the export computes in, which says what rounding explains."""
        return set(self.products & {"float16", "bfloat16"})

    @property
    def trained_dtypes(self) -> set[str]:
        """The 16-bit dtypes that the models compute in or that the weights are stored in."""
        narrow = {dtype for model in self.models.values() for dtype in narrow_dtypes(model)}
        return narrow | ({self.half} if self.half else set()) | {"float32"}

    @property
    def policies(self) -> list[str]:
        """The names of the policies of all layers."""
        layers = (layer for model in self.models.values() for layer in keras_layers.layers_by_path(model).values())
        return sorted({layer.dtype_policy.name for layer in layers})

    def rows(self, batch: Any) -> dict[str, dict[str, np.ndarray]]:
        """Rows for each signature.

        Args:
            batch: the user's for the first one, or None for made-up ones.
        """
        made = {name: made_up(signature.inputs) for name, signature in self.signatures.items()}
        if batch is not None:
            made["serving_default"] = by_name(batch, self.signatures["serving_default"])
        return made

    def answer(self, signature: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the export answers in this process.

        Args:
            signature: its name.
            arrays: the inputs by name.
        """
        before = runtime.remapper_enabled()
        runtime.set_remapper(before and hardware.fusion_is_safe(self.dtypes))
        try:
            given = {name: tf.constant(array) for name, array in arrays.items()}
            return {name: as_array(answer) for name, answer in self.functions[signature](**given).items()}
        finally:
            runtime.set_remapper(before)

    def run(
        self, rows: Mapping[str, Mapping[str, np.ndarray]]
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
        """Answers of the export and of the model itself, for each output of each signature.

        Args:
            rows: as `rows` made them.

        Raises:
            ExportError: the model cannot work with the rows.
        """
        answers, expected = {}, {}
        for name, arrays in rows.items():
            try:
                expected[name] = self.expected(name, arrays)
                answers[name] = self.answer(name, arrays)
            except Exception as error:
                shapes = {key: array.shape for key, array in arrays.items()}
                raise ExportError(
                    f"Signature {name!r} of model {self.models[name].name!r} does not answer rows of the shapes "
                    f"{shapes}. Give rows that it takes: export(..., batch=rows). {type(error).__name__}: {error}"
                ) from error
        return answers, expected

    def expected(self, signature: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What the model itself answers, as it is served.

        Args:
            signature: its name.
            arrays: the inputs by name.
        """
        model = self.models[signature]
        outputs = self.signatures[signature].call(arrays, functools.partial(model, training=False))
        return {name: as_array(widened(tensor, name)) for name, tensor in outputs.items()}

    def origin(self, signature: str, arrays: Mapping[str, np.ndarray], limit: float) -> str | None:
        """Says what makes the export differ from the model, before any runtime; None where nothing does.

        Args:
            signature: its name.
            arrays: the inputs by name.
            limit: largest error of a layer's output, relative to its largest value.
        """
        called, model = self.signatures[signature], self.models[signature]
        if blame.answers_at_random(called, arrays, limit):
            return f"Two calls of model {model.name!r} differ: it answers at random."
        computing, forward = self.forwards[signature]
        expected = blame.outputs_by_layer(called, model, functools.partial(model, training=False), arrays)
        found = blame.outputs_by_layer(called, computing, forward, arrays, in_graph=True)
        nonfinite = blame.first_nonfinite(expected, arrays)
        if nonfinite:
            return f"In model {model.name!r} itself {nonfinite}."
        nonfinite = blame.first_nonfinite(found, {})
        if nonfinite:
            return f"In the export {nonfinite}."
        differs = blame.first_difference(expected, found, limit)
        if differs is None:
            return None
        stored = f" Weights are stored in {self.half}." if self.half else ""
        return f"In the order of the calls {differs}.{stored}"

    def described(self) -> dict[str, Any]:
        """Names, dtypes and shapes of each signature's tensors, as they can be written in JSON."""
        return {
            name: {
                "inputs": [dataclasses.asdict(info) for info in signature.inputs],
                "outputs": [
                    {"name": key, "dtype": spec.dtype.name, "shape": spec.shape.as_list()}
                    for key, spec in self._outputs(name)
                ],
                "own_outputs": self.own_outputs[name],
            }
            for name, signature in self.signatures.items()
        }

    def save(self, path: pathlib.Path) -> None:
        """Writes a SavedModel.

        Args:
            path: an empty folder.
        """
        tf.saved_model.save(self.module, str(path), signatures=self.functions)
        if "bfloat16" in self.products:
            widen_constants(path)

    def _outputs(self, name: str) -> Iterator[tuple[str, tf.TensorSpec]]:
        """In the order of `own_outputs`; TensorFlow sorts them."""
        outputs = self.functions[name].structured_outputs
        for key in self.signatures[name].named(self.own_outputs[name]):
            yield key, outputs[key]


def trace(
    models: Mapping[str, keras.Model],
    precision: str,
    weights: str,
    names: tuple[Names, Names] = (None, None),
    jit_compile: bool = False,
) -> Graph:
    """Traces models for serving.

    Args:
        models: by the name of their signature.
        precision: as for `export`.
        weights: as for `export`.
        names: names of the inputs and outputs of the first.
        jit_compile: whether XLA must compile the signatures.

    Raises:
        ExportError: as `export` does.
    """
    first = next(iter(models))
    signatures = {
        name: signature_of(model, *(names if name == first else (None, None))) for name, model in models.items()
    }
    half = half_of(weights, models[first])
    storage = Storage(half)
    own_outputs: dict[str, list[str]] = {}
    functions, forwards = {}, {}
    for name, signature in signatures.items():
        twin = with_precision(models[name], precision)
        forwards[name] = (twin, storage.forward(twin, models[name]))
        functions[name] = _traced(name, signature, forwards[name][1], own_outputs, jit_compile)
        _refuse_what_servers_cannot_run(name, functions[name], jit_compile)
    computing = [twin for twin, _ in forwards.values()]
    module = tf.Module()
    # Variables alone: tracking the model itself would tie the file to Keras's classes.
    module.model_variables = storage.variables
    module.resources = resources_of(computing)
    floats = {"bfloat16", "float16", "float32", "float64"}  # a layer that looks words up says "string"
    products = frozenset().union(*map(compute_dtypes, computing)) & floats
    return Graph(
        dict(models),
        signatures,
        functions,
        forwards,
        own_outputs,
        "mixed" if products & {"float16", "bfloat16"} else "float32",
        products,
        half,
        storage.paths,
        storage.kept,
        jit_compile,
        module,
    )


def _traced(name: str, signature: Signature, forward: Any, own_outputs: dict[str, list[str]], xla: bool) -> Any:
    plain = dataclasses.replace(signature, outputs=None)

    def serve(**tensors: tf.Tensor) -> dict[str, tf.Tensor]:
        answers = plain.call(tensors, forward)
        own_outputs[name] = list(answers)
        names = signature.named(list(answers))
        return {key: widened(tensor, key) for key, tensor in zip(names, answers.values(), strict=True)}

    specs = {info.name: tf.TensorSpec(info.shape, info.dtype, name=info.name) for info in signature.inputs}
    return tf.function(serve, autograph=False, jit_compile=xla or None).get_concrete_function(**specs)


def _refuse_what_servers_cannot_run(name: str, function: Any, jit_compile: bool) -> None:
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for each in graph.library.function for node in each.node_def)]
    python = sorted({node.name for node in nodes if node.op in ("PyFunc", "EagerPyFunc", "PyFuncStateless")})
    if python:
        raise ExportError(
            f"Signature {name!r} calls Python code ({', '.join(python[:3])}), as tf.py_function and tf.numpy_function "
            "do, which is not in the file and which no server has. Write it with TensorFlow's or Keras's operations."
        )
    compiled = sorted(
        {each.signature.name for each in graph.library.function if each.attr["_XlaMustCompile"].b}
        | {node.name for node in nodes if node.attr["_XlaMustCompile"].b}
    )
    if compiled and not jit_compile:
        raise ExportError(
            f"Signature {name!r} calls functions that XLA must compile ({', '.join(compiled[:3])}), which TensorFlow "
            "Serving refuses unless it is started with --xla_cpu_compilation_enabled=true. Take jit_compile=True from "
            "these functions, or type export(..., jit_compile=True) for such a server."
        )
