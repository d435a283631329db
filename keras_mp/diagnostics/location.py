"""`locate_nonfinite`: the first value of a training step that is infinite or NaN, and what is to blame for it."""

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp._compat import keras_layers
from keras_mp.diagnostics import passes, reports
from keras_mp.diagnostics.statistics import Statistics
from keras_mp.diagnostics.taps import Tap

__all__ = ["Location", "Magnitude", "locate_nonfinite"]

# How many layers before the first value that is not finite a report shows.
_LAST = 12


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """The numbers of one tensor, in short.

    Attributes:
        path: of the layer or weight.
        what: "output", "gradient", "input gradient", "weight gradient" or "input".
        dtype: of the tensor.
        shape: of the tensor.
        largest: the largest finite magnitude.
        rms: the root of the mean square of the finite numbers.
        infinities: how many numbers are infinite.
        nans: how many numbers are NaN.
    """

    path: str
    what: str
    dtype: str
    shape: tuple[int | None, ...] | None
    largest: float
    rms: float
    infinities: int
    nans: int

    def __str__(self) -> str:
        bad = f"  {self.infinities:,} inf, {self.nans:,} nan" if self.infinities or self.nans else ""
        return f"{self.path}  {self.what}  {self.dtype}  max {self.largest:.3g}  rms {self.rms:.3g}{bad}"


@dataclasses.dataclass(frozen=True)
class Location:
    """The first value of a training step that is not finite.

    Attributes:
        layer: path of the layer to blame; of an input or the loss, that of the model.
        what: "input", "weight", "output", "loss" or "gradient".
        count: how many numbers are infinite or NaN.
        loss_scale: the loss scale of the step.
        because_of_loss_scale: whether all is finite without the loss scale.
        reason: what happened, in a sentence.
        before: the last tensors before it, the latest last.

    Example:

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, name="last")], name="net")
    >>> model.compile("sgd", "mse")
    >>> model.set_weights([np.array([[np.nan]]), np.array([0.0])])
    >>> location = locate_nonfinite(model, (np.ones((1, 1)), np.ones((1, 1))))
    >>> location.layer, location.what, location.count
    ('net/last', 'weight', 1)
    """

    layer: str
    what: str
    count: int
    loss_scale: float
    because_of_loss_scale: bool
    reason: str
    before: tuple[Magnitude, ...]

    def __str__(self) -> str:
        lines = [self.reason]
        if self.before:
            lines += ["", f"The last {len(self.before)} tensors up to it, the latest last:"]
            lines += [f"  {each}" for each in self.before]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Returns the location as JSON, in which infinities are strings."""
        return reports.as_json(self)


def locate_nonfinite(model: keras.Model, batch: Any) -> Location | None:
    """Returns the first value of one training step that is infinite or NaN, or None where all are finite.

    The step runs forward and backward once, with the model's dtype policies and loss scale, and changes nothing. Inputs
    and weights are looked at first, then the outputs of layers in the order of computation, the loss, and the gradients
    in the order of the backward pass.

    Args:
        model: a compiled model.
        batch: `(x, y)` or `(x, y, sample_weight)`, as `fit` takes it.

    Returns:
        A `Location`. `print` shows it as text that can be pasted into an issue.

    Raises:
        ArgumentError: where the model is not compiled or does not take the batch.
    """
    x, y, sample_weight = passes.unpacked(model, batch)
    for name, given in (("input", x), ("label", y), ("sample weight", sample_weight)):
        for number, each in enumerate(keras.tree.flatten(given)):
            if each is not None and each.dtype.is_floating and (count := _nonfinite(each.numpy())):
                reason = (
                    f"{name.capitalize()} {number} holds {count:,} of {tf.size(each):,} numbers that are not finite."
                )
                bad = _magnitude(model.name, "input", each.dtype.name, tuple(each.shape), Statistics.of(each))
                return Location(model.name, "input", count, 1.0, False, reason, (bad,))
    if (weight := _bad_weight(model)) is not None:
        return weight
    scale = _loss_scale(model)
    found = passes.run(model, (x, y, sample_weight), scale=scale, what=("output", "gradient", "input gradient"))
    location = _first(model, found, scale)
    if location is None or location.what != "gradient" or scale == 1:
        return location
    unscaled = passes.run(model, (x, y, sample_weight), what=("output", "gradient", "input gradient"))
    if _first(model, unscaled, 1.0) is not None:
        return location
    reason = (
        f"{location.reason} Without the loss scale of {scale:g} all gradients are finite: the loss scale is too large "
        "for this batch. LossScaleOptimizer skips such a step and halves the scale."
    )
    return dataclasses.replace(location, because_of_loss_scale=True, reason=reason)


def _loss_scale(model: keras.Model) -> float:
    optimizer = model.optimizer
    if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return 1.0
    return float(optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale)


def _nonfinite(values: np.ndarray) -> int:
    return int((~np.isfinite(values.astype(np.float64))).sum())


def _bad_weight(model: keras.Model) -> Location | None:
    for layer, path in reversed(keras_layers.paths_of_layers(model)):
        if keras_layers.inner_layers(layer):
            continue
        for variable in layer.variables:
            if not keras.backend.is_float_dtype(variable.dtype):
                continue
            values = keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32"))
            if count := _nonfinite(values):
                reason = f"The weight {variable.name!r} of {path}: {count:,} of {values.size:,} numbers are not finite."
                found = _magnitude(path, "weight", variable.dtype, values.shape, Statistics.of(values))
                return Location(path, "weight", count, _loss_scale(model), False, reason, (found,))
    return None


def _first(model: keras.Model, found: passes.Pass, scale: float) -> Location | None:
    outputs = [(tap, each) for tap, each in found.taps.items() if tap.what == "output"]
    for place, (tap, each) in enumerate(outputs):
        if each.nonfinite:
            before = tuple(_of(*pair) for pair in outputs[max(0, place - _LAST) : place + 1])
            reason = f"The output of {tap.path} ({tap.dtype}) is the first that is not finite: {_kinds(each)}."
            if tap.dtype == "float16" and each.infinities and not each.nans:
                reason += " float16 ends at 65504; bfloat16, or float32 for this layer, holds larger numbers."
            return Location(tap.path, "output", each.nonfinite, scale, False, reason, before)
    if not np.isfinite(found.loss):
        before = tuple(_of(*pair) for pair in outputs[-_LAST:])
        reason = f"All outputs are finite, the loss is not: {found.loss}."
        return Location(model.name, "loss", 1, scale, False, reason, before)
    return _first_gradient(found, scale)


def _first_gradient(found: passes.Pass, scale: float) -> Location | None:
    """The layer whose backward pass made the first gradient that is not finite, out of finite ones."""
    by_layer: dict[str, dict[str, list[Any]]] = {}
    for tap, each in found.taps.items():
        if tap.what != "output":
            by_layer.setdefault(tap.path, {}).setdefault(tap.what, []).append(_of(tap, each))
    for name, gradient in found.gradients.items():
        if gradient is not None:
            path = name.rsplit("/", 1)[0]
            each = Statistics.of(gradient)
            shape = gradient.shape
            by_layer.setdefault(path, {}).setdefault("made", []).append(
                _magnitude(name, "weight gradient", "float32", shape, each)
            )
    suspects = []
    for path, kinds in by_layer.items():
        upstream = kinds.get("gradient", [])
        made = [*kinds.get("input gradient", []), *kinds.get("made", [])]
        bad = [each for each in made if each.infinities or each.nans]
        if bad and not any(each.infinities or each.nans for each in upstream):
            suspects.append((path, upstream, bad))
    everything = [_of(tap, each) for tap, each in found.taps.items() if tap.what == "gradient"]
    bad_ones = [each for each in everything if each.infinities or each.nans]
    if not suspects and not bad_ones:
        return None
    if not suspects:  # the loss made it
        last = bad_ones[-1]
        reason = f"The gradient of the loss to the output of {last.path} is not finite, though the loss is."
        return Location(last.path, "gradient", last.infinities + last.nans, scale, False, reason, (last,))
    # A model around the layer to blame has the same gradients at its doors.
    inner = [each for each in suspects if not any(o[0].startswith(f"{each[0]}/") for o in suspects)]
    path, upstream, bad = inner[-1]
    count = sum(each.infinities + each.nans for each in bad)
    reason = (
        f"The backward pass of {path} makes the first gradient that is not finite: {bad[0].what} with "
        f"{bad[0].infinities:,} infinite and {bad[0].nans:,} NaN numbers, out of finite gradients to its output."
    )
    return Location(path, "gradient", count, scale, False, reason, (*everything[-_LAST:], *upstream, *bad))


def _kinds(found: Statistics) -> str:
    return f"{found.infinities:,} infinite and {found.nans:,} NaN of {found.size:,} numbers"


def _of(tap: Tap, found: Statistics) -> Magnitude:
    return _magnitude(tap.path, tap.what, tap.dtype, tap.shape, found)


def _magnitude(path: str, what: str, dtype: str, shape: Any, found: Statistics) -> Magnitude:
    return Magnitude(path, what, dtype, shape, found.largest, found.rms, found.infinities, found.nans)
