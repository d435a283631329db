"""Looks at a model and its step for the figures that findings are made of."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.tuning import findings
from keras_mp.tuning.inputs import Data
from keras_mp.tuning.matmul_counts import Work, count_matmuls

__all__ = ["about_model", "about_sizes", "matmuls_of_step"]


def matmuls_of_step(model: keras.Model, batch: Any) -> Work | None:
    """Counts the matmuls and convolutions of a training step.

    Args:
        model: a compiled and built model.
        batch: as `fit` takes it.

    Returns:
        The count, or None for a custom step that cannot be traced like this.
    """
    try:
        specs = keras.tree.map_structure(
            lambda leaf: None if leaf is None else tf.TensorSpec(leaf.shape, leaf.dtype), batch
        )
        step = tf.autograph.experimental.do_not_convert(model.train_step)
        return count_matmuls(tf.function(step).get_concrete_function(specs).graph)
    except Exception:  # a custom step that only runs when Keras calls it
        return None


def about_model(
    model: keras.Model, work: Work | None, step_ms: float | None, times: Sequence[ProductTimes]
) -> list[str]:
    """Returns findings about the share of matmuls in a step, and about small ones.

    Args:
        model: the model, whose layers give matmuls their names.
        work: the matmuls of a step, where they were counted.
        step_ms: time of a step in float32, where it was timed.
        times: time of a bare matmul for each 16-bit dtype.
    """
    if work is None or step_ms is None:
        return []
    names = frozenset(part for path in keras_layers.layers_by_path(model) for part in path.split("/")) | {model.name}
    return findings.about_share(work, step_ms, times) + findings.about_small_matmuls(work, _kernels(model), names)


def about_sizes(
    model: keras.Model, data: Data, outputs: Sequence[np.ndarray], fast_dtypes: frozenset[str]
) -> list[str]:
    """Returns findings about sizes that do not fill the hardware's blocks.

    Args:
        model: the model.
        data: the batch, whose feature sizes nobody can choose.
        outputs: the model's outputs, whose sizes nobody can choose either.
        fast_dtypes: dtypes that the hardware is fast at.
    """
    arrays = [*keras.tree.flatten(data.x), *outputs]
    given = frozenset(array.shape[-1] for array in arrays if array is not None and len(array.shape) > 1)
    return findings.about_dimensions(_kernels(model), data.rows, fast_dtypes, given)


def _kernels(model: keras.Model) -> list[findings.Kernel]:
    return [
        findings.Kernel(path, _as_matrix(layer, tuple(getattr(layer, name).shape)))
        for path, layer in keras_layers.layers_by_path(model).items()
        for name in ("kernel", "recurrent_kernel")
        if len(getattr(getattr(layer, name, None), "shape", ())) > 1
    ]


def _as_matrix(layer: keras.Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a kernel. An einsum's kernel becomes a matrix: contracted sizes, then kept sizes."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return shape
    inputs, kernel = layer.equation.replace(" ", "").partition("->")[0].split(",")
    summed = [size for label, size in zip(kernel, shape, strict=True) if label in inputs]
    kept = [size for label, size in zip(kernel, shape, strict=True) if label not in inputs]
    return math.prod(summed), math.prod(kept)
