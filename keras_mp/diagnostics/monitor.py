"""`PrecisionMonitor`: a Keras callback that watches what half precision does to a training while it runs."""

import collections
import contextlib
import dataclasses
import importlib.util
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_mp.diagnostics.formats import FORMATS, Format
from keras_mp.diagnostics.statistics import Statistics
from keras_mp.diagnostics.taps import Tap, Taps
from keras_mp.errors import ArgumentError, KerasMPWarning
from keras_mp.policies.policy import stacklevel

__all__ = ["Observation", "PrecisionMonitor", "TensorHealth"]

# A gradient of which more becomes zero in its dtype is mostly lost.
_MOSTLY_LOST = 0.5
# The loss departs from its own trend when it is so many standard deviations above the mean of the last steps. The rule
# is Shewhart's control chart for single values (W. A. Shewhart, 1931; NIST Handbook of Statistical Methods, 6.3.1).
_DEVIATIONS, _WINDOW = 3.0, 50


@dataclasses.dataclass(frozen=True)
class TensorHealth:
    """The state of one tensor in a step that was looked at.

    Attributes:
        path: of the layer.
        what: "output" or "gradient".
        dtype: of the tensor.
        largest: the largest magnitude; of gradients, as they are with the loss scale.
        rms: the root of the mean square.
        zeros: the share of zeros.
        near_underflow: the share of the numbers other than zero that are subnormal in the tensor's dtype.
        headroom: how many times the largest number fits below overflow.
        nonfinite: how many numbers are infinite or NaN.
    """

    path: str
    what: str
    dtype: str
    largest: float
    rms: float
    zeros: float
    near_underflow: float
    headroom: float
    nonfinite: int


@dataclasses.dataclass(frozen=True)
class Observation:
    """What the monitor saw at one step.

    Attributes:
        step: number of the step, counted over all epochs.
        loss: of the step, as Keras reports it.
        loss_scale: after the step; None without a loss-scale optimizer.
        skipped_steps: so far.
        tensors: one for each tensor, in the order of the forward pass.
    """

    step: int
    loss: float | None
    loss_scale: float | None
    skipped_steps: int
    tensors: tuple[TensorHealth, ...]


class PrecisionMonitor(keras.callbacks.Callback):
    """Watches loss scale, skipped steps and the numbers of every layer while a model trains.

    `loss_scale` and `skipped_steps` come to `logs`, so that the progress bar, `CSVLogger` and TensorBoard show them.
    Every `every` steps a step runs that was traced with statistics of all outputs and their gradients. All other steps
    run what Keras traced without the monitor.

    Args:
        every: how many steps from one look to the next.
        log_dir: folder for TensorBoard: scalars of each layer. None writes nothing.
        layers: pattern of layer paths to look at, as for `re.search`. None looks at all.

    Attributes:
        history: list of `Observation`, one for each look.

    Warns:
        KerasMPWarning: where most gradients of a layer are lost, where numbers are not finite, where most steps of an
            epoch are skipped, and where the loss departs from its trend.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")], name="net")
    >>> model.compile("sgd", "mse")
    >>> monitor = PrecisionMonitor(every=2)
    >>> _ = model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=2, verbose=0, callbacks=[monitor])
    >>> [observation.step for observation in monitor.history]
    [0, 2]
    >>> monitor.history[0].tensors[0].path
    'net/last'
    """

    def __init__(
        self, every: int = 100, log_dir: "str | pathlib.Path | None" = None, layers: str | None = None
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ArgumentError(f"`every` is a number of steps, at least 1. Received: every={every!r}.")
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ArgumentError(f"`log_dir={str(log_dir)!r}` needs TensorBoard. Type: pip install tensorboard")
        super().__init__()
        self.every, self.log_dir, self.layers = every, log_dir, layers
        self.history: list[Observation] = []
        self._step = 0
        self._taps: Taps | None = None
        self._functions: dict[bool, Any] = {}
        self._looking = contextlib.ExitStack()
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._told: set[str] = set()
        self._writer: Any = None
        self._skipped_at_epoch = 0

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Prepares for a training."""
        self._functions, self._taps = {}, None
        self._step = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) + self._skipped()
        if self.log_dir is not None and _is_chief():
            self._writer = tf.summary.create_file_writer(str(self.log_dir))

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Remembers how many steps were skipped before."""
        self._skipped_at_epoch, self._steps_at_epoch = self._skipped(), self._step

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Has every `every`-th step run with statistics."""
        per_call = self.model.steps_per_execution
        if any((self._step + ahead) % self.every == 0 for ahead in range(per_call)):
            self._look()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the loss scale into the logs and reads the statistics of a step that had them."""
        looked = self._taps is not None and bool(self._functions.get(False))
        scale, skipped = self._scale(), self._skipped()
        if logs is not None and scale is not None:
            logs["loss_scale"], logs["skipped_steps"] = scale, skipped
        if self.model.train_function is self._functions.get(True) and looked:
            self._end_look()
            self._read(logs, scale, skipped)
        self._watch_loss(logs)
        self._step += self.model.steps_per_execution

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts the loss scale into the logs of the epoch and warns of skipped steps."""
        scale, skipped = self._scale(), self._skipped()
        if scale is None:
            return
        if logs is not None:
            logs["loss_scale"], logs["skipped_steps"] = scale, skipped
        steps = self._step - self._steps_at_epoch
        if steps and 2 * (skipped - self._skipped_at_epoch) > steps > 3:
            self._warn(
                f"skips {epoch}",
                f"{skipped - self._skipped_at_epoch} of the {steps} steps of epoch {epoch + 1} were skipped, because "
                "gradients were not finite. keras_mp.locate_nonfinite(model, batch) names the layer.",
            )

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Leaves the model as it was."""
        self._end_look()
        if self._functions:
            self.model.train_function = self._functions[False]
        if self._writer is not None:
            self._writer.close()

    def _look(self) -> None:
        if self._taps is None:
            self._taps = Taps(self.model, layers=self.layers)
        plain = self.model.train_function
        if True not in self._functions:
            self.model.make_train_function(force=True)
            self._functions = {False: plain, True: self.model.train_function}
        self._taps.reset()
        self._looking.enter_context(self._taps.active())
        self.model.train_function = self._functions[True]

    def _end_look(self) -> None:
        self._looking.close()
        if self._functions:
            self.model.train_function = self._functions[False]

    def _read(self, logs: Mapping[str, Any] | None, scale: float | None, skipped: int) -> None:
        assert self._taps is not None
        found = {tap: each for tap, each in self._taps.read().items() if each.size}
        tensors = tuple(_health(tap, each) for tap, each in found.items())
        loss = None if not logs or logs.get("loss") is None else float(logs["loss"])
        self.history.append(Observation(self._step, loss, scale, skipped, tensors))
        for tensor in tensors:
            self._judge(tensor)
        if self._writer is not None:
            self._write(found)

    def _judge(self, tensor: TensorHealth) -> None:
        where = f"the {tensor.what} of {tensor.path} ({tensor.dtype})"
        if tensor.nonfinite and tensor.what == "output":
            self._warn(f"{where} nonfinite", f"Step {self._step}: {where} has {tensor.nonfinite:,} numbers not finite.")
        elif tensor.what == "gradient" and tensor.near_underflow > _MOSTLY_LOST:
            self._warn(
                f"{where} lost",
                f"Step {self._step}: {tensor.near_underflow:.0%} of {where} is below the smallest normal number, so "
                "most of it is lost or loses digits. A larger loss scale, or bfloat16 for this layer, keeps it.",
            )

    def _watch_loss(self, logs: Mapping[str, Any] | None) -> None:
        loss = None if not logs or logs.get("loss") is None else float(logs["loss"])
        if loss is None:
            return
        if len(self._losses) == _WINDOW:
            mean = sum(self._losses) / _WINDOW
            deviation = (sum((each - mean) ** 2 for each in self._losses) / _WINDOW) ** 0.5
            if not loss <= mean + _DEVIATIONS * deviation + 1e-6 * abs(mean):
                self._warn(
                    "loss",
                    f"Step {self._step}: the loss of {loss:.4g} is more than {_DEVIATIONS:g} standard deviations above "
                    f"the mean of the last {_WINDOW} steps, {mean:.4g} (Shewhart's rule for single values).",
                )
        self._losses.append(loss)

    def _warn(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(message, KerasMPWarning, stacklevel=stacklevel())

    def _write(self, found: dict[Tap, Statistics]) -> None:
        with self._writer.as_default(step=self._step):
            for tap, each in found.items():
                health = _health(tap, each)
                name = f"precision/{tap.path}/{tap.what}" + (f"_{tap.number}" if tap.number else "")
                tf.summary.scalar(f"{name}/rms", health.rms)
                tf.summary.scalar(f"{name}/largest", health.largest)
                tf.summary.scalar(f"{name}/near_underflow", health.near_underflow)
        self._writer.flush()

    def _scale(self) -> float | None:
        optimizer = self.model.optimizer
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or not optimizer.built:
            return None
        return float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))

    def _skipped(self) -> int:
        optimizer = self.model.optimizer
        return int(optimizer.skipped_steps) if hasattr(optimizer, "skipped_steps") and optimizer.built else 0


def _health(tap: Tap, found: Statistics) -> TensorHealth:
    format: Format | None = FORMATS.get(tap.dtype)
    lost = format.underflow(found) + format.subnormal(found) if format else 0.0
    limit = format.limit if format else 2.0**128
    headroom = limit / found.largest if found.largest else float("inf")
    zeros = found.zeros / found.size if found.size else 0.0
    return TensorHealth(tap.path, tap.what, tap.dtype, found.largest, found.rms, zeros, lost, headroom, found.nonfinite)


def _is_chief() -> bool:
    resolver = tf.distribute.get_strategy().cluster_resolver
    return resolver is None or not resolver.task_type or resolver.task_type == "chief" or resolver.task_id == 0
