"""`compare`: a training step in float32 and in half precision, layer by layer, judged by what rounding must cost."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_calls, keras_layers
from keras_mp.conversion.convert import convert
from keras_mp.diagnostics import passes, reports
from keras_mp.diagnostics.formats import FORMATS
from keras_mp.diagnostics.taps import Tap
from keras_mp.ops import fusion
from keras_mp.policies.policy_map import PolicyMap

__all__ = ["Comparison", "LayerComparison", "compare"]

# An error so many times that of honest rounding is not honest. Errors of models that are rounded at the same places but
# in another way differ by less: see tests/diagnostics/test_comparison.py, which measures it on models without faults.
_FACTOR = 5.0
# A tensor whose spread rounding blurs by this share holds numbers, such as ids, times or positions, that are large
# against their differences.
_BLURRED = 0.05


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """One tensor of a training step, in float32 and in half precision.

    Attributes:
        path: of the layer or weight.
        what: "output", "gradient" (of the loss to the output) or "weight gradient".
        dtype: of the tensor in half precision.
        error: root of the mean square of the difference, over the standard deviation of the float32 values.
        expected: the same for a float32 model whose outputs and gradients are rounded to half precision.
        cosine: of the angle between both, as vectors.
        new_zeros: the share of numbers other than zero in float32 that are zero.
        nonfinite: how many numbers are infinite or NaN where float32's are finite.
        verdict: "rounding", "rounded away" (the numbers are large against their differences), "worse than rounding",
            "lost" (most became zero) or "not finite".
    """

    path: str
    what: str
    dtype: str
    error: float
    expected: float
    cosine: float
    new_zeros: float
    nonfinite: int
    verdict: str


@dataclasses.dataclass(frozen=True)
class Comparison(reports.Report):
    """A training step in float32 and in half precision.

    Attributes:
        policy: of the model in half precision.
        loss: of the step in float32.
        loss_in_policy: of the step under the policy.
        loss_scale: that the gradients under the policy were taken with.
        layers: one for each tensor, outputs in the order of computation, then gradients.
        first_bad: the first of them that is worse than rounding, or None.
    """

    policy: str
    loss: float
    loss_in_policy: float
    loss_scale: float
    layers: tuple[LayerComparison, ...]
    first_bad: LayerComparison | None

    title = "Float32 and half precision"

    def headline(self) -> str:
        """Returns the most important thing in a sentence or two."""
        loss = f"The loss is {self.loss_in_policy:.6g} under {self.policy} and {self.loss:.6g} in float32."
        if self.first_bad is None:
            return f"All {len(self.layers)} tensors differ by no more than rounding must cost. {loss}"
        bad = self.first_bad
        return (
            f"{bad.path} is the first layer that is {bad.verdict}: its {bad.what} ({bad.dtype}) is off by "
            f"{bad.error:.2g} of its spread, and rounding alone costs {bad.expected:.2g}. {loss}"
        )

    def tables(self) -> list[reports.Table]:
        """Returns the tables of the report."""
        bad = [each for each in self.layers if each.verdict != "rounding"]
        columns = ("layer", "tensor", "dtype", "error", "rounding", "cosine", "zeros", "verdict")
        rows = [
            (
                e.path,
                e.what,
                e.dtype,
                f"{e.error:.2g}",
                f"{e.expected:.2g}",
                f"{e.cosine:.4f}",
                f"{e.new_zeros:.1%}",
                e.verdict,
            )
            for e in (*bad, *(each for each in self.layers if each.verdict == "rounding"))
        ]
        return [reports.Table("Tensors, those that stand out first", columns, rows)]

    def figure(self) -> Any:
        """Returns a picture of the errors by tensor, beside what rounding costs."""
        figure, axes = reports.axes(len(self.layers))
        for what, color in (("output", "#2f6db5"), ("gradient", "#d9822b"), ("weight gradient", "#5c9e6f")):
            places = [place for place, each in enumerate(self.layers) if each.what == what]
            axes.plot([self.layers[p].error for p in places], places, "o", color=color, markersize=4, label=what)
        bad = [place for place, each in enumerate(self.layers) if each.verdict != "rounding"]
        axes.plot([self.layers[p].error for p in bad], bad, "o", color="none", mec="#c0392b", ms=9, label="stands out")
        expected = [each.expected for each in self.layers]
        axes.plot(expected, range(len(expected)), "|", color="#8795a5", markersize=7, label="rounding alone")
        axes.set_xscale("log")
        axes.set_xlabel("error, as a share of the spread in float32")
        reports.label_rows(axes, [f"{each.path} {each.what}" for each in self.layers])
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.6 / (0.2 * len(self.layers) + 1)), ncols=3, frameon=False
        )
        return figure


def compare(
    model: keras.Model, batch: Any, policy: "str | keras.DTypePolicy | PolicyMap | keras.Model" = "mixed_float16"
) -> Comparison:
    """Compares a training step in float32 with one in half precision, with the same weights and random numbers.

    Both run forward and backward once, on copies of the model. An error is judged against that of a float32 copy whose
    layers' outputs and gradients are rounded to half precision: it passes through the same layers, so it knows what
    rounding must cost at each depth.

    Args:
        model: a compiled model.
        batch: `(x, y)` or `(x, y, sample_weight)`, as `fit` takes it.
        policy: a dtype policy or `PolicyMap`, as for `keras_mp.convert`; or a model with the same layers and weights.

    Returns:
        A `Comparison`.

    Raises:
        ArgumentError: where the model is not compiled or does not take the batch.
        ConversionError: where the model cannot be converted.
    """
    given = passes.unpacked(model, batch)
    reference = convert(model, "float32")
    half = policy if isinstance(policy, keras.Model) else convert(model, policy)
    name = half.name if isinstance(policy, keras.Model) else str(getattr(policy, "name", policy))
    formats = _formats(half)
    format = "float16" if "float16" in formats.values() else "bfloat16"
    scale = 2.0**15 if format == "float16" else 1.0
    coarsest = FORMATS[format].epsilon if formats else 2.0**-20

    exact, exact_pass = _values(reference, given, 1.0)
    _round_weights(reference, formats)
    simulated = []
    for noise in (False, True):
        with _rounding(reference, formats, noise):
            simulated.append(_values(reference, given, 1.0))
    found, found_pass = _values(half, given, scale)

    layers = []
    for what in ("output", "gradient"):
        for tap, values in exact.items():
            key = (tap.path, tap.what, tap.number)
            if tap.what == what and key in found and found[key][1].shape == values[1].shape:
                dtype, there = found[key]
                costs = [each[key][1] for each, _ in simulated]
                layers.append(_judge(tap.path, what, dtype, coarsest, values[1], there, costs))
    for path, gradient in exact_pass.gradients.items():
        there = found_pass.gradients.get(path)
        if gradient is not None and there is not None:
            dtype = formats.get(path.rsplit("/", 1)[0], "float32")
            costs = [each.gradients[path] for _, each in simulated]
            layers.append(_judge(path, "weight gradient", dtype, coarsest, gradient, there / scale, costs))
    first = next((each for each in layers if each.verdict != "rounding"), None)
    return Comparison(name, exact_pass.loss, found_pass.loss, scale, tuple(layers), first)


def _values(model: keras.Model, batch: Any, scale: float) -> tuple[Any, passes.Pass]:
    """Returns the values of each tensor of a step, joined where a layer is called several times."""
    parts: dict[Tap, list[np.ndarray]] = {}

    def see(tap: Tap, values: np.ndarray) -> None:
        parts.setdefault(tap, []).append(np.array(values, np.float32))

    found = passes.run(model, batch, scale=scale, see=see)
    factors = {"output": 1.0, "gradient": scale}
    joined = {
        tap: (tap.dtype, np.concatenate([each.reshape(-1) for each in parts[tap]]) / factors[tap.what])
        for tap in found.taps
        if tap in parts
    }
    return _ByKey(joined), found


class _ByKey(dict):
    """Values by `Tap`, found by path, kind and number as well, in whatever dtype."""

    def __init__(self, values: dict[Tap, Any]) -> None:
        super().__init__(values)
        self._keys = {(tap.path, tap.what, tap.number): tap for tap in values}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._keys[key])


def _formats(model: keras.Model) -> dict[str, str]:
    """The half-precision compute dtype of each layer that has one, by path."""
    return {
        path: layer.compute_dtype
        for layer, path in keras_layers.paths_of_layers(model)
        if layer.compute_dtype in FORMATS
    }


@contextlib.contextmanager
def _rounding(model: keras.Model, formats: dict[str, str], noise: bool) -> Iterator[None]:
    """Inside, the outputs of a float32 model's layers, and the gradients to them, are rounded as the formats say.

    With noise, half a unit of the last digit at random is added before, so that other numbers are rounded up.
    """
    dtypes = {id(layer): formats[path] for layer, path in keras_layers.paths_of_layers(model) if path in formats}

    def after(operation: keras.Operation, outputs: Any) -> Any:
        dtype = dtypes.get(id(operation))
        if dtype is None or keras_calls.in_symbolic_call():
            return outputs
        return keras.tree.map_structure(lambda y: _rounded(y, dtype, noise), outputs)

    with keras_calls.calls_through(lambda operation, arguments: arguments, after):
        yield


def _rounded(y: Any, dtype: str, noise: bool) -> Any:
    if not isinstance(y, tf.Tensor) or y.dtype != tf.float32:
        return y

    epsilon = FORMATS[dtype].epsilon

    def round_once(x: tf.Tensor) -> tf.Tensor:
        # Whole numbers beyond those that the format holds are ids, positions or counts, which nothing may round.
        kept = tf.reduce_all(x == tf.round(x)) & (tf.reduce_max(tf.abs(x)) > 1 / epsilon)
        shifted = x * (1 + epsilon / 2 * tf.random.uniform(tf.shape(x), -1, 1)) if noise else x
        # The digits only: what a format's range costs is a fault, and gradients have no loss scale here.
        return tf.where(kept, x, _digits(shifted, _digits_of(dtype)))

    @fusion.custom_gradient
    def run(x: tf.Tensor) -> Any:
        return round_once(x), round_once

    return keras_layers.with_attachments(run(y), keras_layers.mask_of(y), keras_layers.logits_of(y))


def _round_weights(model: keras.Model, formats: dict[str, str]) -> None:
    for layer, path in keras_layers.paths_of_layers(model):
        if path in formats and not keras_layers.inner_layers(layer):
            for variable in layer.trainable_variables:
                variable.assign(_digits(variable.value, _digits_of(formats[path])))


def _digits_of(dtype: str) -> int:
    return 1 - int(math.log2(FORMATS[dtype].epsilon))


def _digits(x: tf.Tensor, digits: int) -> tf.Tensor:
    """Rounds to a number of binary digits, whatever the exponent, by Veltkamp's splitting."""
    split = x * (2.0 ** (24 - digits) + 1)
    return split - (split - x)


def _judge(
    path: str,
    what: str,
    dtype: str,
    coarsest: float,
    exact: np.ndarray,
    found: np.ndarray,
    simulated: Sequence[np.ndarray],
) -> LayerComparison:
    exact, found, *simulated = (each.astype(np.float64).reshape(-1) for each in (exact, found, *simulated))
    finite = np.isfinite(exact)
    nonfinite = int((~np.isfinite(found[finite])).sum())
    keep = np.all([np.isfinite(each) for each in (exact, found, *simulated)], axis=0)
    exact, found, *simulated = (each[keep] for each in (exact, found, *simulated))
    spread = float(exact.std()) if exact.size > 1 else abs(float(exact.sum()))
    spread = spread or float(np.sqrt((exact**2).mean())) if exact.size else 1.0
    error, *costs = (_root_mean_square(each - exact) / spread if spread else 0.0 for each in (found, *simulated))
    expected = max(costs)
    norms = math.sqrt((exact**2).sum() * (found**2).sum())
    cosine = float((exact * found).sum() / norms) if norms else float(not exact.any() and not found.any())
    there = exact != 0
    zeros = float((found[there] == 0).mean()) if there.any() else 0.0
    zeros_by_rounding = max(float((each[there] == 0).mean()) for each in simulated) if there.any() else 0.0
    epsilon = FORMATS[dtype].epsilon if dtype in FORMATS else 0.0
    blurred = epsilon * _root_mean_square(exact) / spread / math.sqrt(12) if spread else 0.0
    # A rectifier or a maximum takes the other side for a share of its inputs that is proportional to their error. Each
    # of these changes a gradient as a whole, so that the error of gradients grows with the square root.
    floor = _FACTOR * coarsest if what == "output" else 3 * math.sqrt(coarsest / 2)
    if nonfinite:
        verdict = "not finite"
    elif zeros - zeros_by_rounding > 0.5:
        verdict = "lost"
    elif blurred > _BLURRED and error > _BLURRED:
        verdict = "rounded away"
    elif error > max(_FACTOR * expected, floor):
        verdict = "worse than rounding"
    else:
        verdict = "rounding"
    return LayerComparison(path, what, dtype, error, expected, cosine, zeros, nonfinite, verdict)


def _root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt((x**2).mean())) if x.size else 0.0
