"""`diagnose`: what half precision loses in each tensor of a training step, and the policy that follows."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_mp._compat import keras_layers
from keras_mp.conversion.convert import convert
from keras_mp.diagnostics import passes, reports
from keras_mp.diagnostics.comparison import Comparison, compare
from keras_mp.diagnostics.formats import FORMATS, best_loss_scale
from keras_mp.diagnostics.statistics import Statistics
from keras_mp.errors import ArgumentError, KerasMPWarning
from keras_mp.policies.policy_map import PolicyMap

__all__ = ["Diagnosis", "Loss", "TensorDiagnosis", "diagnose"]

# How often a recommendation is tried before the layer it fails in is given up as a whole.
_TRIES = 6
# Gradients of which more becomes zero at the best loss scale are mostly lost.
_LOST = 0.5


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a format loses of a tensor.

    Attributes:
        overflow: share of the numbers other than zero that become infinite.
        underflow: share that becomes zero.
        subnormal: share that loses digits, because it is below the smallest normal number.
    """

    overflow: float
    underflow: float
    subnormal: float


@dataclasses.dataclass(frozen=True)
class TensorDiagnosis:
    """One tensor of a training step in float32.

    Attributes:
        path: of the layer, or of the weight.
        what: "output", "gradient", "weight" or "weight gradient".
        shape: of the tensor.
        largest: the largest magnitude.
        smallest: the smallest magnitude other than zero.
        losses: by format; gradients are multiplied by that format's best loss scale.
    """

    path: str
    what: str
    shape: tuple[int | None, ...] | None
    largest: float
    smallest: float
    losses: dict[str, Loss]


@dataclasses.dataclass(frozen=True)
class Diagnosis(reports.Report):
    """What half precision does to a model, and what to do about it.

    Attributes:
        policy: the `PolicyMap` to convert the model with; it was tried on the batch.
        initial_scale: for `keras_mp.LossScaleOptimizer`; 1 where the policy needs none.
        layers: one for each tensor, in the order of the forward pass.
        best_scales: by format, the exponent of the loss scale at which nothing overflows and least becomes zero.
        pinned: by pattern, why those layers stay in float32.
        tried: the comparison of the policy with float32.
        line: the line of Python to write.
    """

    policy: PolicyMap
    initial_scale: float
    layers: tuple[TensorDiagnosis, ...]
    best_scales: dict[str, int]
    pinned: dict[str, str]
    tried: Comparison
    line: str

    title = "Diagnosis of half precision"

    def headline(self) -> str:
        """Returns the most important thing in a sentence or two."""
        name = self.policy.default_policy.name
        if self.tried.first_bad is not None:
            bad = self.tried.first_bad
            return (
                f"No half precision suits this model as a whole: even under the best policy found the {bad.what} of "
                f"{bad.path} is {bad.verdict}. Keep the model in float32, or look at that layer."
            )
        if not self.pinned:
            text = f"{name} suits every layer of this model: nothing differs from float32 by more than rounding."
        else:
            text = f"{name} suits this model with {len(self.pinned)} pattern(s) in float32."
        if self.initial_scale != 1:
            text += f" Start the loss scale at 2**{round(math.log2(self.initial_scale))}."
        return f"{text} Write: {self.line}"

    def tables(self) -> list[reports.Table]:
        """Returns the tables of the report."""
        tables = []
        if self.pinned:
            tables.append(reports.Table("Layers to keep in float32", ("pattern", "why"), [*self.pinned.items()]))
        formats = list(self.best_scales)
        columns = ("layer", "tensor", "largest", "smallest", *(f"{name} over/under" for name in formats))
        worst = sorted(self.layers, key=lambda each: -max(_badness(each.losses[name]) for name in formats))
        rows = [
            (e.path, e.what, f"{e.largest:.2g}", f"{e.smallest:.2g}", *(_shares(e.losses[name]) for name in formats))
            for e in worst
        ]
        return [*tables, reports.Table("Tensors, those that lose most first", columns, rows)]

    def figure(self) -> Any:
        """Returns a picture of the range of each tensor beside the ranges of the formats."""
        tensors = [each for each in self.layers if each.largest]
        figure, axes = reports.axes(len(tensors))
        for name, color in zip(self.best_scales, ("#2f6db5", "#5c9e6f", "#d9822b", "#9067a7"), strict=False):
            format = FORMATS[name]
            axes.axvspan(2.0 ** (format.tiny + 1), format.limit, color=color, alpha=0.08, label=name)
        for place, each in enumerate(tensors):
            color = "#d9822b" if each.what.endswith("gradient") else "#1b2733"
            axes.plot([each.smallest, each.largest], [place, place], color=color, linewidth=2.5, solid_capstyle="round")
        axes.set_xscale("log", base=2)
        axes.set_xlim(2.0**-45, 2.0**20)
        axes.set_xlabel("magnitude in float32, gradients (orange) without a loss scale")
        reports.label_rows(axes, [f"{each.path} {each.what}" for each in tensors])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / (0.2 * len(tensors) + 1)), ncols=4, frameon=False)
        return figure


def diagnose(model: keras.Model, batch: Any, formats: Sequence[str] = ("float16", "bfloat16")) -> Diagnosis:
    """Finds out what half precision loses in a training step, and recommends a policy that was tried.

    One forward and backward pass in float32 counts the exponents of all tensors. From these counts follow the shares
    that overflow or become zero in each format, at every loss scale. Policies are then tried in the order of the
    formats that fit: the model is converted, run on the batch and compared with float32. Layers that differ by more
    than rounding are pinned to float32.

    Args:
        model: a compiled model.
        batch: `(x, y)` or `(x, y, sample_weight)`, as `fit` takes it.
        formats: of "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2". The last two are counted, not tried.

    Returns:
        A `Diagnosis`.

    Raises:
        ArgumentError: for an unknown format, or where the model is not compiled or does not take the batch.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> diagnosis = diagnose(model, (np.ones((8, 4)), np.ones((8, 1))))
    >>> diagnosis.policy.default_policy.name, diagnosis.pinned, diagnosis.initial_scale
    ('mixed_bfloat16', {}, 1.0)
    """
    unknown = [each for each in formats if each not in FORMATS]
    if unknown or not formats or isinstance(formats, str):
        raise ArgumentError(f"`formats` is a list of {', '.join(map(repr, FORMATS))}. Received: {formats!r}.")
    given = passes.unpacked(model, batch)
    reference = convert(model, "float32")
    found = passes.run(reference, given)
    gradients = [each for tap, each in found.taps.items() if tap.what == "gradient"]
    gradients += [Statistics.of(each) for each in found.gradients.values() if each is not None]
    scales = {name: best_loss_scale(gradients, FORMATS[name]) if name != "bfloat16" else 0 for name in formats}
    tensors = tuple(_tensors(found, scales))

    best: tuple[PolicyMap, dict[str, str], Comparison] | None = None
    for name in sorted(set(formats) & {"float16", "bfloat16"}):  # bfloat16 first: it needs no loss scale
        tried = _try(model, batch, name, tensors)
        if best is None or _is_better(tried, best):
            best = tried
        if not tried[1] and tried[2].first_bad is None:
            break
    if best is None:
        best = _try(model, batch, "bfloat16", tensors)
    policy, pinned, comparison = best
    in_float16 = policy.default_policy.compute_dtype == "float16"
    initial_scale = 2.0 ** scales.get("float16", 15) if in_float16 else 1.0
    return Diagnosis(policy, initial_scale, tensors, scales, pinned, comparison, _line(policy))


def _try(
    model: keras.Model, batch: Any, name: str, tensors: Sequence[TensorDiagnosis]
) -> tuple[PolicyMap, dict[str, str], Comparison]:
    """Returns a policy of a format with as few layers in float32 as needed, why these are, and its comparison."""
    pinned: dict[str, str] = {}
    for tensor in tensors:
        loss = tensor.losses.get(name)
        if loss is not None and tensor.what == "output" and loss.overflow and not _holds_others(model, tensor.path):
            pinned[re.escape(tensor.path)] = f"{loss.overflow:.1%} of its outputs overflow in {name}"
        if loss is None or tensor.what != "gradient" or _holds_others(model, tensor.path):
            continue
        if loss.underflow > _LOST:
            pinned[re.escape(tensor.path)] = f"{loss.underflow:.0%} of its gradients become zero in {name}"
    pinned = {pattern: why for pattern, why in pinned.items() if _is_layer(model, pattern)}
    for _ in range(_TRIES):
        policy = PolicyMap(f"mixed_{name}", dict.fromkeys(pinned, "float32"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KerasMPWarning)
            comparison = compare(model, batch, policy)
        bad = comparison.first_bad
        pattern = None if bad is None else _pattern_for(model, bad.path, pinned)
        if bad is None or pattern is None:
            break
        pinned[pattern] = f"its {bad.what} is {bad.verdict} in {name} ({bad.error:.2g} of its spread)"
    for path, why in _left_in_float32(model, policy):
        pinned.setdefault(re.escape(path), why)
    return PolicyMap(f"mixed_{name}", dict.fromkeys(pinned, "float32")), pinned, comparison


def _left_in_float32(model: keras.Model, policy: PolicyMap) -> Iterator[tuple[str, str]]:
    """The layers of the user's own classes that `convert` leaves in float32, so that the policy names them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KerasMPWarning)
        converted = _layers(convert(model, policy))
    for path, layer in _layers(model).items():
        own = not type(layer).__module__.startswith(("keras.", "keras_mp."))
        left = path in converted and converted[path].compute_dtype == "float32" != policy[path].compute_dtype
        if own and left and layer is not model and not keras_layers.inner_layers(layer):
            yield path, f"{type(layer).__name__} does not run in {policy.default_policy.compute_dtype}, or handles ids"


def _is_better(
    one: tuple[PolicyMap, dict[str, str], Comparison], other: tuple[PolicyMap, dict[str, str], Comparison]
) -> bool:
    return (one[2].first_bad is not None, len(one[1])) < (other[2].first_bad is not None, len(other[1]))


def _layers(model: keras.Model) -> dict[str, keras.Layer]:
    return keras_layers.layers_by_path(model)


def _holds_others(model: keras.Model, path: str) -> bool:
    layer = _layers(model).get(path)
    return layer is None or bool(keras_layers.inner_layers(layer))


def _is_layer(model: keras.Model, pattern: str) -> bool:
    return any(re.escape(path) == pattern for path in _layers(model))


def _pattern_for(model: keras.Model, path: str, pinned: dict[str, str]) -> str | None:
    """The pattern of the layer that a path leads to, or of the nearest one around it that is not pinned yet."""
    layers, parts = _layers(model), path.split("/")
    for depth in range(len(parts), 1, -1):
        outer = "/".join(parts[:depth])
        if outer in layers and re.escape(outer) not in pinned:
            return re.escape(outer)
    return None


def _tensors(found: passes.Pass, scales: dict[str, int]) -> Any:
    for tap, each in found.taps.items():
        yield _tensor(tap.path, tap.what, tap.shape, each, scales)
    for path, value in found.weights.items():
        yield _tensor(path, "weight", value.shape, Statistics.of(value), scales)
    for path, gradient in found.gradients.items():
        if gradient is not None:
            yield _tensor(path, "weight gradient", gradient.shape, Statistics.of(gradient), scales)


def _tensor(path: str, what: str, shape: Any, found: Statistics, scales: dict[str, int]) -> TensorDiagnosis:
    losses = {}
    for name, scale in scales.items():
        exponent = scale if what.endswith("gradient") else 0
        format = FORMATS[name]
        losses[name] = Loss(
            format.overflow(found, exponent), format.underflow(found, exponent), format.subnormal(found, exponent)
        )
    return TensorDiagnosis(path, what, shape, found.largest, found.smallest, losses)


def _line(policy: PolicyMap) -> str:
    patterns = {pattern: each.name for pattern, each in policy.items()}
    name = policy.default_policy.name
    return (
        f"keras_mp.convert(model, keras_mp.PolicyMap({name!r}, {patterns!r}))"
        if patterns
        else f"keras_mp.convert(model, {name!r})"
    )


def _badness(loss: Loss) -> float:
    return 2 * loss.overflow + loss.underflow


def _shares(loss: Loss) -> str:
    return f"{loss.overflow:.1%} / {loss.underflow:.1%}"
