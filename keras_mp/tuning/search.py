"""`tune`: tries what there is to choose from on copies of a model, within a time, and recommends."""

import contextlib
import dataclasses
import itertools
import math
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_mp import hardware
from keras_mp._compat import keras_layers, keras_models, runtime, tf_replicas
from keras_mp.conversion.convert import convert, duplicate
from keras_mp.errors import ArgumentError, ConversionError, KerasMPError, KerasMPWarning
from keras_mp.policies.advice import advice
from keras_mp.policies.policy import compute_dtypes
from keras_mp.tuning import arguments, findings
from keras_mp.tuning.matmul_counts import Work, count_products
from keras_mp.tuning.report import Candidate, Tuning, recommend, why_recommended
from keras_mp.tuning.timing import Copy, Step, largest_error, mean_of_runs, paired_ratio, take_turns

__all__ = ["tune"]

# The largest error of an output, as a share of what it varies by, that rounding to a dtype explains; in float32 XLA
# adds up in another order than TensorFlow.
_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_TOLERANCE_FLOAT32 = 1e-3

# Runs whose mean is compared where a model samples, and how many times as far as two such means in float32 are apart
# another may be.
_SAMPLED_RUNS = 8
_SAMPLED_FACTOR = 2.0

# Where a step is shorter, what is between two of them is a part of it that several steps in one call save.
_SHORT_STEP_MS = 20.0
_STEPS = 16

# How many times longer XLA compiles than TensorFlow traces, until it is seen.
_XLA_COMPILES = 4.0

# What else is compiled may take longer than what was seen: 16 bits add casts.
_SLOWER_THAN_SEEN = 1.5

# Rounds to find out what is clearly slower, and those that are compared; fewer than that are no measurement.
_FIRST_ROUNDS = 4
_ROUNDS = 15
_ROUNDS_TO_COMPARE = 3
_CLEARLY_SLOWER = 1.5

# The share of the budget that is kept for timing the input pipeline, and the most that it gets.
_FOR_PIPELINE = 0.15

# The share that is kept for letting go of copies and functions, which takes seconds where XLA compiled many.
_FOR_RELEASE = 0.1
_PIPELINE_SECONDS = 5.0
_PIPELINE_BATCHES = 20

# Lines that Keras and TensorFlow put around what an error says.
_AROUND = re.compile(
    r"Exception encountered|Arguments received|Graph execution error|Detected at node|File |\[\[\{\{|<stack traces"
)


def tune(
    model: keras.Model,
    batch: Any,
    *,
    policies: "str | keras.DTypePolicy | Sequence[str | keras.DTypePolicy] | None" = None,
    jit_compile: "bool | Sequence[bool] | None" = None,
    steps_per_execution: "int | Sequence[int] | None" = None,
    budget: float = 60.0,
) -> Tuning:
    """Finds the dtype policy and the compiler that train a model fastest here, by timing its training step.

    Each candidate is a copy of the model by `keras_mp.convert`, trained on one batch; the model itself stays as it is,
    and so do the global policy and the random numbers of Python and NumPy. Candidates take turns, so that what slows
    the machine slows all of them, and compilation is not counted. Their outputs have to agree with those of float32 on
    the same weights: to 1e-3 of what an output varies by over the batch (its standard deviation, of each feature) in
    float32, which XLA adds up in another order, 1e-2 in float16, 5e-2 in bfloat16. Outputs that do not vary are judged
    by their level. Of a model that samples when it is called, as a variational autoencoder does, the means of several
    runs are compared, as far as two such means agree in float32. One is recommended over the model as it is only if it
    is faster by more than 5% and the noise.

    Args:
        model: a compiled Keras model under any policy. One that is not built is built, as a copy, from the batch.
        batch: `(x, y)` or `(x, y, sample_weight)` as `fit` takes them, of the size of one batch, arrays or tensors in
            any structure; or a `tf.data.Dataset` of batches. Of a dataset the first batch is timed, and then the
            whole, to see whether steps wait for it.
        policies: the policies to try. None for float32, mixed_bfloat16 and mixed_float16. float32 is always timed.
        jit_compile: what of it to try. None for both.
        steps_per_execution: what of it to try. None for 1, and for 16 with the fastest, if a step is below 20 ms.
        budget: seconds to take. Nothing is begun that would not be done by then, as far as that can be foreseen, and
            what is left out is named; a compilation that has begun is not interrupted, and may take longer.

    Returns:
        A `Tuning`: `.policy`, `.jit_compile`, `.steps_per_execution`, `.reason`, `.candidates` with all figures, and
        `.findings`, sentences that say why 16 bits do or do not pay here. Printed, it is a table.

    Raises:
        ArgumentError: for a model that is not compiled, runs eagerly or cannot be trained on the batch, a dataset
            without a batch, a batch of another structure, and other arguments that cannot be.
        PolicyError: for a policy that does not exist.
        DistributionError: for a model made in the scope of a strategy with several replicas.
        ConversionError: for a model that cannot be copied.

    Example:

    >>> import keras, keras_mp
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> model.compile("adam", "mse")
    >>> batch = np.ones((8, 4), "float32"), np.ones((8, 2), "float32")
    >>> tuning = keras_mp.tune(model, batch, policies="float32", jit_compile=False, budget=20)
    >>> tuning.policy, tuning.jit_compile
    ('float32', False)
    """
    begun = time.perf_counter()
    arguments.require_trainable(model, budget)
    compilers = arguments.choices("jit_compile", jit_compile, bool) or [False, True]
    steps = arguments.choices("steps_per_execution", steps_per_execution, int)
    with _all_left_as_it_was():
        wanted = arguments.policies(policies)
        return _Search(model, arguments.Data(batch), wanted, compilers, steps, budget, begun + budget).run()


class _Search:
    """One call of `tune`."""

    def __init__(
        self,
        model: keras.Model,
        data: arguments.Data,
        policies: dict[str, keras.DTypePolicy],
        compilers: list[bool],
        steps: list[int],
        budget: float,
        end: float,
    ) -> None:
        self.model, self.data, self.policies, self.compilers, self.steps = model, data, policies, compilers, steps
        self.budget = budget
        self.end = (
            end
            - _FOR_RELEASE * budget
            - (0.0 if data.dataset is None else min(_PIPELINE_SECONDS, _FOR_PIPELINE * budget))
        )
        self.here = hardware.detect_for(tf_replicas.strategy_of(model))
        device = self.here.accelerators[0].kind.upper() if self.here.accelerators else "CPU"
        self.products = [hardware.measure(dtype, device) for dtype in ("bfloat16", "float16")]
        self.remapper = runtime.remapper_enabled()
        self.candidates: list[Candidate] = []
        self.running: dict[int, Step] = {}  # by the place of its candidate
        self.tried: set[tuple[Copy, bool, int]] = set()
        self.errors: dict[tuple[int, bool], float] = {}
        self.findings: list[str] = []
        self.runs = 1  # of which outputs are the mean; several where the model samples
        self.starting_seconds = {False: 0.0, True: 0.0}  # the longest that was seen; 0 where none was

    def run(self) -> Tuning:
        self.own = self._copy_as_it_is()
        self.copies: dict[str, Copy | None] = {}
        self.current = bool(self.model.jit_compile), int(self.model.steps_per_execution)
        self._begin_with_float32()
        work = self._work()
        self._try(self.own.policy, self.own, *self.current)
        queue = itertools.product(self.policies, self.compilers, self.steps or [1])
        for name, compiler, count in sorted(queue, key=self._promise):
            self._try(name, self.copies.get(name), compiler, count)
        self._take_turns(_FIRST_ROUNDS)
        self._drop_what_is_clearly_slower()
        self._try_several_steps()
        self._take_turns(_ROUNDS)
        chosen = recommend(self.candidates)
        if chosen is None:  # float32 agrees with itself
            raise self._not_finite("outputs")
        self._explain(work)
        return Tuning(
            chosen.policy,
            chosen.jit_compile,
            chosen.steps_per_execution,
            why_recommended(chosen, self.candidates),
            tuple(self.candidates),
            self.findings,
        )

    def _copy_as_it_is(self) -> Copy:
        start = time.perf_counter()
        try:
            copy = duplicate(self.model)
            keras_models.build(copy, self.data.first)
        except ConversionError:
            raise
        except Exception as error:
            raise self._untrainable(error) from error
        self.copying_seconds = time.perf_counter() - start
        return Copy(copy, _policy_of(copy), True, self._remapper_for(copy))

    def _begin_with_float32(self) -> None:
        name = "float32"
        if compute_dtypes(self.own.model) <= {"float32"}:
            self.copies[name] = self.own
        else:
            self._convert(name, keras.DTypePolicy(name))
        self.reference = self.copies[name]
        if self.reference is None:
            raise ArgumentError(f"tune(): {self.candidates[-1].why}")
        try:
            runs = self.reference.outputs(self.data.x, False, 2)
            self._require_finite(runs)
            self.expected, again = runs
            self.error_of_float32 = largest_error(again, self.expected)
            if self.error_of_float32 > _TOLERANCE_FLOAT32:
                self.findings += findings.about_sampling(self.error_of_float32, _SAMPLED_RUNS)
                self.runs = _SAMPLED_RUNS
                runs = self.reference.outputs(self.data.x, False, 2 * self.runs)
                self._require_finite(runs)
                self.expected = mean_of_runs(runs[: self.runs])
                self.error_of_float32 = largest_error(mean_of_runs(runs[self.runs :]), self.expected)
        except ArgumentError:
            raise
        except Exception as error:
            raise self._untrainable(error) from error
        self.errors[id(self.reference), False] = self.error_of_float32
        try:
            self._start(self.reference, min(self.compilers), 1, required=True)
        except Exception as error:
            raise self._untrainable(error) from error
        if not math.isfinite(self.running[0].first_loss):
            raise self._not_finite("loss")

    def _require_finite(self, runs: Sequence[Sequence[np.ndarray]]) -> None:
        # An infinity may be meant, as in logits that are masked.
        outputs = [output for run in runs for output in run if output.size]
        if any(np.isnan(output).any() or not np.isfinite(output).any() for output in outputs):
            raise self._not_finite("outputs")

    def _not_finite(self, what: str) -> ArgumentError:
        are = "outputs are" if what == "outputs" else "loss is"
        return ArgumentError(
            f"tune(): {self.model.name!r}'s {are} not finite for this batch in float32. Look for NaN and infinity in "
            "the batch, inputs and targets, and in model.get_weights(): np.isfinite(x).all()."
        )

    def _untrainable(self, error: Exception) -> ArgumentError:
        return ArgumentError(
            f"tune(): {self.model.name!r} cannot be trained on this batch. {_in_words(error).rstrip('.')}. "
            f"Received a batch of {arguments.described(self.data.first)}. Give (x, y) or (x, y, sample_weight) of one "
            "batch, as fit takes it."
        )

    def _convert(self, name: str, policy: keras.DTypePolicy) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", KerasMPWarning)
            self.own.restore()
            try:
                converted = convert(self.own.model, policy)
                keras_models.build(converted, self.data.first)
            except Exception as error:
                self.copies[name] = None
                self.candidates.append(Candidate(name, min(self.compilers), why=f"failed: {_in_words(error)}"))
                return
        known = advice(policy, hardware.in_use(), call="convert(model, {})")
        self.findings += [
            f"{name}: {each.message}"
            for each in told
            if issubclass(each.category, KerasMPWarning) and str(each.message) not in known
        ]
        if _layers_of(converted) == _layers_of(self.own.model):
            self.copies[name] = self.own
        else:
            self.copies[name] = Copy(converted, name, False, self._remapper_for(converted))

    def _remapper_for(self, model: keras.Model) -> bool:
        # As `set_policy` does; what is timed beside it keeps the fusion.
        return self.remapper and hardware.fusion_is_safe(compute_dtypes(model), self.here)

    def _try(self, name: str, copy: Copy | None, jit_compile: bool, steps: int) -> None:
        if (copy is None and name in self.copies) or (copy is not None and (copy, jit_compile, steps) in self.tried):
            return  # it could not be converted, which is told, or has had its turn
        if not self._is_time_for(name, jit_compile, steps, self.copying_seconds if copy is None else 0.0):
            left_out = self._candidate(name, copy, jit_compile, steps)
            self.candidates.append(dataclasses.replace(left_out, why="not timed: it would not be done in time"))
            return
        if copy is None:
            self._convert(name, self.policies[name])
            copy = self.copies[name]
        if copy is not None and (copy, jit_compile, steps) not in self.tried:
            self._start(copy, jit_compile, steps)

    def _candidate(self, name: str, copy: Copy | None, jit_compile: bool, steps: int) -> Candidate:
        is_own = copy is self.own
        current = is_own and (jit_compile, steps) == self.current
        return Candidate(name, jit_compile, steps, current=current, converted=not is_own)

    def _start(self, copy: Copy, jit_compile: bool, steps: int, required: bool = False) -> None:
        self.tried.add((copy, jit_compile, steps))
        candidate = self._candidate(copy.policy, copy, jit_compile, steps)
        start = time.perf_counter()
        try:
            key = id(copy), jit_compile
            if key not in self.errors:
                outputs = mean_of_runs(copy.outputs(self.data.x, jit_compile, self.runs))
                self.errors[key] = largest_error(outputs, self.expected)
            tolerance = max(_TOLERANCE.get(each, _TOLERANCE_FLOAT32) for each in compute_dtypes(copy.model))
            if self.runs > 1:
                # What is drawn may be infinite here and there, which is no measure for others.
                tolerance += _SAMPLED_FACTOR * min(self.error_of_float32, 1.0)
            # What all are compared with agrees with itself, whatever it draws.
            agrees = self.errors[key] <= tolerance or (copy is self.reference and not jit_compile)
            candidate = dataclasses.replace(candidate, error=self.errors[key], agrees=agrees)
            step = Step(copy, self.data.cached, jit_compile, steps)
        except Exception as error:
            if required:
                raise
            self.candidates.append(dataclasses.replace(candidate, why=f"failed: {_in_words(error)}"))
            return
        finally:
            seconds = time.perf_counter() - start
            self.starting_seconds[jit_compile] = max(self.starting_seconds[jit_compile], seconds)
        self.running[len(self.candidates)] = step
        self.candidates.append(candidate)

    def _is_time_for(self, name: str, jit_compile: bool, steps: int, copying: float) -> bool:
        """Whether a candidate can be compiled, timed and compared before the end, as far as can be foreseen."""
        base = self.starting_seconds[False] or self.starting_seconds[True] / _XLA_COMPILES
        starting = (self.starting_seconds[True] or base * _XLA_COMPILES) if jit_compile else base
        slower = max([1.0, *(1 / each.ratio for each in self.products if each.dtype in name)])
        turns = sum(step.turn_seconds for step in self.running.values())
        needed = (
            copying + _SLOWER_THAN_SEEN * starting + self.running[0].first_ms * slower * steps * 6 / 1000 + 3 * turns
        )
        return time.perf_counter() + needed < self.end

    def _promise(self, entry: tuple[str, bool, int]) -> tuple[bool, bool, float, int]:
        """Sorts what to try: dtypes whose products gain nothing last, and XLA, which compiles for long, late."""
        name, jit_compile, steps = entry
        gain = next((each.ratio for each in self.products if each.dtype in name), math.inf)
        return gain < 1, jit_compile, -gain, steps

    def _take_turns(self, rounds: int) -> None:
        before = {place: step.times for place, step in self.running.items()}
        for step in self.running.values():
            step.times = []
        expected = sum(step.turn_seconds for step in self.running.values())
        if take_turns(list(self.running.values()), rounds, self.end, expected) < _ROUNDS_TO_COMPARE:
            for place, step in self.running.items():
                step.times = before[place] + step.times
        self._drop_what_failed()
        reference = self.running[0]
        for place, step in self.running.items():
            rounds_of_both = min(len(step.times), len(reference.times))
            if not rounds_of_both:
                ratio, noise = step.step_ms / reference.step_ms, 1.0
            else:
                ratio, noise = paired_ratio(step.times[-rounds_of_both:], reference.times[-rounds_of_both:])
            self.candidates[place] = dataclasses.replace(
                self.candidates[place], step_ms=step.step_ms, ratio=ratio, noise=noise
            )

    def _drop_what_failed(self) -> None:
        failed = {place: step.error for place, step in self.running.items() if step.error is not None}
        for place, error in failed.items():
            if place == 0:
                raise self._untrainable(error) from error
            self.candidates[place] = dataclasses.replace(
                self.candidates[place], why=f"failed after some steps on this batch: {_in_words(error)}"
            )
            del self.running[place]

    def _drop_what_is_clearly_slower(self) -> None:
        least = min(self.candidates[place].ratio or 1.0 for place in self.running)
        for place in list(self.running):
            candidate = self.candidates[place]
            if place and not candidate.current and (candidate.ratio or 1.0) > _CLEARLY_SLOWER * least:
                self.candidates[place] = dataclasses.replace(
                    candidate, why=f"dropped: over {_CLEARLY_SLOWER} times the fastest"
                )
                del self.running[place]

    def _try_several_steps(self) -> None:
        # A candidate that was dropped may still have the shortest step, by noise.
        left = [self.candidates[place] for place in sorted(self.running)]
        agreeing = [each for each in left if each.agrees and each.ratio is not None]
        best = recommend(agreeing)
        if self.steps or best is None:
            return
        fastest = min(agreeing, key=lambda each: each.step_ms or 0.0)
        # Several steps help float32 as well, with which the others are compared.
        for each in dict.fromkeys((best, fastest, self.candidates[0])):
            if each.step_ms is not None and each.step_ms < _SHORT_STEP_MS and each.steps_per_execution == 1:
                self._try(each.policy, self.running[self.candidates.index(each)].copy, each.jit_compile, _STEPS)

    def _work(self) -> Work | None:
        if self.reference is None or time.perf_counter() + 2 * self.starting_seconds[False] > self.end:
            return None
        try:
            specs = keras.tree.map_structure(
                lambda leaf: None if leaf is None else tf.TensorSpec(leaf.shape, leaf.dtype), self.data.first
            )
            step = tf.autograph.experimental.do_not_convert(self.reference.model.train_step)
            return count_products(tf.function(step).get_concrete_function(specs).graph)
        except Exception:  # a step of the user's own, that only runs as Keras calls it; it is not described then
            return None

    def _explain(self, work: Work | None) -> None:
        layers = keras_layers.layers_by_path(self.own.model)
        names = frozenset(part for path in layers for part in path.split("/")) | {self.model.name}
        kernels = [
            findings.Kernel(path, _as_matrix(layer, tuple(getattr(layer, name).shape)))
            for path, layer in layers.items()
            for name in ("kernel", "recurrent_kernel")
            if len(getattr(getattr(layer, name, None), "shape", ())) > 1
        ]
        self.findings += findings.about_hardware(self.here)
        self.findings += findings.about_products(self.products)
        if work is not None and self.candidates[0].step_ms is not None:
            self.findings += findings.about_share(work, self.candidates[0].step_ms, self.products)
            self.findings += findings.about_small_products(work, kernels, names)
        arrays = [*keras.tree.flatten(self.data.x), *self.expected]
        sizes = frozenset(array.shape[-1] for array in arrays if array is not None and len(array.shape) > 1)
        self.findings += findings.about_dimensions(kernels, self.data.rows, self.here.fast_dtypes, sizes)
        self.findings += findings.about_short_steps(self.candidates)
        self.findings += findings.about_failed(self.candidates)
        self.findings += findings.about_untimed(self.candidates, self.budget)
        if self.data.dataset is not None:
            try:
                told = findings.about_pipeline(self._time_pipeline(self.data.dataset))
            except Exception as error:  # of a later batch than the first, which the candidates were timed on
                told = [f"The dataset was not timed, for it failed after its first batch: {_in_words(error)}"]
            self.findings = told + self.findings

    def _time_pipeline(self, dataset: tf.data.Dataset) -> findings.Pipeline:
        """Times a step with the user's dataset, beside the same with the cached batch, and the dataset alone."""
        single = [each for each in self.running.values() if each.steps_per_execution == 1]
        step = min(single, key=lambda each: each.step_ms)
        # Without an end, so that a short dataset is enough; starting it over is a part of training too.
        batches = iter(dataset.repeat())
        start = time.perf_counter()
        step.call(batches)  # fills what the dataset buffers
        seconds = max(_PIPELINE_SECONDS - (time.perf_counter() - start), 0.0) / 2
        fed = _some(lambda: step.call(batches), seconds)
        cached = _some(step.call, seconds / 2)
        alone = _some(lambda: _milliseconds(lambda: next(batches)), seconds)
        # A mean, where there is a buffer: some batches come at once and others late.
        return findings.Pipeline(statistics.median(cached), statistics.fmean(fed), statistics.fmean(alone))


def _some(run: Callable[[], float], seconds: float) -> list[float]:
    """What a function answers, called until the time is over or it was enough, and once at least."""
    end = time.perf_counter() + seconds
    answers = [run()]
    while len(answers) < _PIPELINE_BATCHES and time.perf_counter() < end:
        answers.append(run())
    return answers


def _milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


@contextlib.contextmanager
def _all_left_as_it_was() -> Iterator[None]:
    policy, remapper = keras.config.dtype_policy(), runtime.remapper_enabled()
    logger = tf.get_logger()  # which counts as retracing that there are several models
    level = logger.level
    logger.setLevel("ERROR")
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the copies; what there is to say is in the findings
            yield
    finally:
        logger.setLevel(level)
        keras.config.set_dtype_policy(policy)
        runtime.set_remapper(remapper)
        random.setstate(python)
        np.random.set_state(numpy)


def _as_matrix(layer: keras.Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a kernel, that of an einsum with what is summed over as one size and what is not as another."""
    if not isinstance(layer, keras.layers.EinsumDense):
        return shape
    inputs, kernel = layer.equation.replace(" ", "").partition("->")[0].split(",")
    summed = [size for label, size in zip(kernel, shape, strict=True) if label in inputs]
    kept = [size for label, size in zip(kernel, shape, strict=True) if label not in inputs]
    return math.prod(summed), math.prod(kept)


def _policy_of(model: keras.Model) -> str:
    """The policy that stands for those of a model's layers: the only one, or that of most of its narrow ones."""
    names = [layer.dtype_policy.name for layer in keras_layers.layers_by_path(model).values() if layer.weights]
    narrow = [name for name in names if "16" in name]
    return statistics.mode(narrow or names or ["float32"])


def _layers_of(model: keras.Model) -> list[tuple[str, type, str, Any]]:
    return [
        (path, type(layer), layer.dtype_policy.name, getattr(layer, "activation", None))
        for path, layer in keras_layers.layers_by_path(model).items()
        if not keras_layers.inner_layers(layer)
    ]


def _in_words(error: Exception) -> str:
    """What an error says, without what Keras puts around it, in one line."""
    text = re.sub(r"\x1b\[\d*m|\{\{function_node [^}]*\}\} ", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _AROUND.match(line)]
    words = lines[0] if lines else ""
    words = words if len(words) <= 300 else f"{words[:300]}..."
    return words if isinstance(error, KerasMPError) else f"{type(error).__name__}: {words}"
