"""The graph of an export: a model traced for each signature, over variables of its own."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import backend, hardware
from keras_mp.errors import ExportError
from keras_mp.export.operations import widen_constants
from keras_mp.export.precision import Storage, half_of, narrow_dtypes, resources_of, with_precision
from keras_mp.export.sample import made_up
from keras_mp.export.signature import Names, Signature, as_array, by_name, signature_of, widened
from keras_mp.policy import compute_dtypes

__all__ = ["Graph", "trace"]


@dataclasses.dataclass(frozen=True)
class Graph:
    """What is going to be written.

    Attributes:
        models: the models as they were trained, by the name of their signature; the first is `serving_default`.
        signatures: how each is called.
        functions: each traced, with the dtypes that are served.
        own_outputs: the names that their outputs would have if the user had given none.
        precision: "float32" or "mixed".
        products: the dtypes that the layers compute in.
        half: the dtype of half-size weights, or None.
        kept: paths of variables that could not be held in it.
        jit_compile: whether XLA must compile it.
        module: the object to save.
    """

    models: dict[str, keras.Model]
    signatures: dict[str, Signature]
    functions: dict[str, Any]
    own_outputs: dict[str, list[str]]
    precision: str
    products: frozenset[str]
    half: str | None
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
        layers = (layer for model in self.models.values() for layer in backend.layers_by_path(model).values())
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
        before = backend.remapper_enabled()
        backend.set_remapper(before and hardware.fusion_is_safe(self.dtypes))
        try:
            given = {name: tf.constant(array) for name, array in arrays.items()}
            return {name: as_array(answer) for name, answer in self.functions[signature](**given).items()}
        finally:
            backend.set_remapper(before)

    def measure(
        self, rows: Mapping[str, Mapping[str, np.ndarray]]
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, dict[str, float]]]]:
        """Answers of the export, and their largest error against the model, for each output of each signature.

        Args:
            rows: as `rows` made them.

        Raises:
            ExportError: the model cannot work with the rows.
        """
        answers, errors = {}, {}
        for name, arrays in rows.items():
            model = self.models[name]
            try:
                expected = self.signatures[name].call(arrays, functools.partial(model, training=False))
                answers[name] = self.answer(name, arrays)
            except Exception as error:
                shapes = {key: array.shape for key, array in arrays.items()}
                raise ExportError(
                    f"Signature {name!r} of model {model.name!r} does not answer rows of the shapes {shapes}. Give "
                    f"rows that it takes: export(..., batch=rows). {type(error).__name__}: {error}"
                ) from error
            errors[name] = {
                key: _error(answers[name][key], as_array(widened(tensor, key))) for key, tensor in expected.items()
            }
        return answers, errors

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
    functions, computing = {}, []
    for name, signature in signatures.items():
        twin = with_precision(models[name], precision)
        computing.append(twin)
        forward = storage.forward(twin, models[name])
        functions[name] = _traced(name, signature, forward, own_outputs, jit_compile)
        _refuse_what_servers_cannot_run(name, functions[name], jit_compile)
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
        own_outputs,
        "mixed" if products & {"float16", "bfloat16"} else "float32",
        products,
        half,
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


def _error(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    if not np.issubdtype(expected.dtype, np.floating):
        share = float(np.mean(found != expected)) if found.size else 0.0
        return {"largest": float(share > 0), "relative": share}
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        error = float(np.max(np.where(same, 0.0, np.abs(found.astype("float64") - expected)), initial=0.0))
    largest = float(np.max(np.abs(expected[np.isfinite(expected)]), initial=0.0))
    return {"largest": error, "relative": error / largest if largest else error}
