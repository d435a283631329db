"""`tune` times copies of a model under several policies and compilers, and recommends one."""

import dataclasses
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mp import hardware
from keras_mp._compat import keras_layers, keras_models, runtime, tf_replicas
from keras_mp.conversion.convert import convert, duplicate
from keras_mp.errors import ArgumentError, ConversionError, KerasMPWarning
from keras_mp.policies.advice import advice
from keras_mp.policies.policy import compute_dtypes
from keras_mp.tuning import explanation, findings, inputs, pipeline_timing
from keras_mp.tuning.isolation import nothing_else_changed
from keras_mp.tuning.matmul_counts import Work
from keras_mp.tuning.report import Candidate, Tuning, error_in_words, recommend, why_recommended
from keras_mp.tuning.timing import Copy, Step, largest_error, mean_of_runs, paired_ratio, take_turns

__all__ = ["tune"]

# The largest error that rounding to a dtype explains, as a share of an output's spread. In float32, XLA adds in
# another order than TensorFlow.
_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_TOLERANCE_FLOAT32 = 1e-3

# A model that samples is judged by means over this many runs. Two float32 means differ; a candidate may differ by this
# factor more.
_SAMPLED_RUNS = 8
_SAMPLED_FACTOR = 2.0

# Between shorter steps, Python takes a large share of the time. Several steps in one call save it.
_SHORT_STEP_MS = 20.0
_STEPS = 16

# XLA compiles about this many times longer than TensorFlow traces; replaced by the first measurement.
_XLA_COMPILES = 4.0

# Half precision adds casts, so other candidates may compile longer than the first.
_SLOWER_THAN_SEEN = 1.5

# Rounds that find clearly slower candidates, rounds that compare the others, and the fewest that count.
_FIRST_ROUNDS = 4
_ROUNDS = 15
_ROUNDS_TO_COMPARE = 3
_CLEARLY_SLOWER = 1.5

# The largest share of the budget for timing the input pipeline.
_FOR_PIPELINE = 0.15

# The share for releasing copies and functions, which takes seconds after XLA compiled many.
_FOR_RELEASE = 0.1


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

    Each candidate is a copy of the model by `keras_mp.convert` and trains on one batch. The model, the global policy
    and the random states of Python and NumPy stay as they are. Candidates take turns, so a slow moment of the machine
    slows all of them. Compilation is not counted.

    Each candidate's outputs must agree with float32 on the same weights. The tolerance is a share of an output's
    standard deviation over the batch: 1e-3 in float32 (XLA adds in another order), 1e-2 in float16 and 5e-2 in
    bfloat16. Constant outputs are judged by their level. A model that samples, such as a variational autoencoder, is
    judged by means over several runs. A candidate must be faster than the model as it is by more than 5% and the noise.

    Args:
        model: a compiled Keras model under any policy. If it is not built, a copy is built from the batch.
        batch: `(x, y)` or `(x, y, sample_weight)` as `fit` takes them: one batch of arrays or tensors in any
            structure. Or a `tf.data.Dataset` of batches: its first batch is timed, then the whole dataset, to see
            whether steps wait for it.
        policies: the policies to try. Default: float32, mixed_bfloat16 and mixed_float16. float32 is always timed.
        jit_compile: the values to try. Default: both.
        steps_per_execution: the values to try. Default: 1, and 16 with the fastest if its step is below 20 ms.
        budget: time limit in seconds. A candidate that is not expected to finish in time is skipped and named. A
            compilation that has begun is not interrupted, so it may take longer.

    Returns:
        A `Tuning`: `.policy`, `.jit_compile`, `.steps_per_execution`, `.reason`, `.candidates` with all figures, and
        `.findings`, sentences that say why half precision does or does not pay here. It prints as a table.

    Raises:
        ArgumentError: for a model that is not compiled, runs eagerly or cannot be trained on the batch; an empty
            dataset; a batch of another structure; and other invalid arguments.
        PolicyError: for an unknown policy.
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
    inputs.require_trainable(model, budget)
    compilers = inputs.choices("jit_compile", jit_compile, bool) or [False, True]
    steps = inputs.choices("steps_per_execution", steps_per_execution, int)
    with nothing_else_changed():
        wanted = inputs.policies(policies)
        return _Search(model, inputs.Data(batch), wanted, compilers, steps, budget, begun + budget).run()


class _Search:
    """One call of `tune`."""

    def __init__(
        self,
        model: keras.Model,
        data: inputs.Data,
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
            - (0.0 if data.dataset is None else min(pipeline_timing.SECONDS, _FOR_PIPELINE * budget))
        )
        self.here = hardware.detect_for(tf_replicas.strategy_of(model))
        device = self.here.accelerators[0].kind.upper() if self.here.accelerators else "CPU"
        self.matmul_times = [hardware.measure(dtype, device) for dtype in ("bfloat16", "float16")]
        self.remapper = runtime.remapper_enabled()
        self.candidates: list[Candidate] = []
        self.running: dict[int, Step] = {}  # by the place of its candidate
        self.tried: set[tuple[Copy, bool, int]] = set()
        self.errors: dict[tuple[int, bool], float] = {}
        self.findings: list[str] = []
        self.runs = 1  # outputs are means over them; several if the model samples
        self.starting_seconds = {False: 0.0, True: 0.0}  # the longest so far

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
        self.findings = self._explained(work)
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
        reference = self.copies[name]
        if reference is None:
            raise ArgumentError(f"tune(): {self.candidates[-1].why}")
        self.reference = reference
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
        # An infinity may be intended, as in masked logits.
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
            f"tune(): {self.model.name!r} cannot be trained on this batch. {error_in_words(error).rstrip('.')}. "
            f"Received a batch of {inputs.described(self.data.first)}. Give (x, y) or (x, y, sample_weight) of one "
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
                self.candidates.append(Candidate(name, min(self.compilers), why=f"failed: {error_in_words(error)}"))
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
        # As `set_policy` does. Other candidates keep the fusion.
        return self.remapper and hardware.fusion_is_safe(compute_dtypes(model), self.here)

    def _try(self, name: str, copy: Copy | None, jit_compile: bool, steps: int) -> None:
        if (copy is None and name in self.copies) or (copy is not None and (copy, jit_compile, steps) in self.tried):
            return  # its conversion failed and was reported, or it was tried before
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
                # A drawn output may be infinite, which says nothing about others.
                tolerance += _SAMPLED_FACTOR * min(self.error_of_float32, 1.0)
            # The reference agrees with itself even if it samples.
            agrees = self.errors[key] <= tolerance or (copy is self.reference and not jit_compile)
            candidate = dataclasses.replace(candidate, error=self.errors[key], agrees=agrees)
            step = Step(copy, self.data.cached, jit_compile, steps)
        except Exception as error:
            if required:
                raise
            self.candidates.append(dataclasses.replace(candidate, why=f"failed: {error_in_words(error)}"))
            return
        finally:
            seconds = time.perf_counter() - start
            self.starting_seconds[jit_compile] = max(self.starting_seconds[jit_compile], seconds)
        self.running[len(self.candidates)] = step
        self.candidates.append(candidate)

    def _is_time_for(self, name: str, jit_compile: bool, steps: int, copying: float) -> bool:
        """Estimates whether a candidate can be compiled, timed and compared before the end."""
        base = self.starting_seconds[False] or self.starting_seconds[True] / _XLA_COMPILES
        starting = (self.starting_seconds[True] or base * _XLA_COMPILES) if jit_compile else base
        slower = max([1.0, *(1 / each.ratio for each in self.matmul_times if each.dtype in name)])
        turns = sum(step.turn_seconds for step in self.running.values())
        needed = (
            copying + _SLOWER_THAN_SEEN * starting + self.running[0].first_ms * slower * steps * 6 / 1000 + 3 * turns
        )
        return time.perf_counter() + needed < self.end

    def _promise(self, entry: tuple[str, bool, int]) -> tuple[bool, bool, float, int]:
        """Returns a sort key: dtypes without a gain in matmuls come last, and XLA, which compiles long, comes late."""
        name, jit_compile, steps = entry
        gain = next((each.ratio for each in self.matmul_times if each.dtype in name), math.inf)
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
                self.candidates[place], why=f"failed after some steps on this batch: {error_in_words(error)}"
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
        # Several steps in one call help float32 as well.
        for each in dict.fromkeys((best, fastest, self.candidates[0])):
            if each.step_ms is not None and each.step_ms < _SHORT_STEP_MS and each.steps_per_execution == 1:
                self._try(each.policy, self.running[self.candidates.index(each)].copy, each.jit_compile, _STEPS)

    def _work(self) -> Work | None:
        if time.perf_counter() + 2 * self.starting_seconds[False] > self.end:
            return None
        return explanation.matmuls_of_step(self.reference.model, self.data.first)

    def _explained(self, work: Work | None) -> list[str]:
        told = [
            *self.findings,
            *findings.about_hardware(self.here),
            *findings.about_matmuls(self.matmul_times),
            *explanation.about_model(self.own.model, work, self.candidates[0].step_ms, self.matmul_times),
            *explanation.about_sizes(self.own.model, self.data, self.expected, self.here.fast_dtypes),
            *findings.about_short_steps(self.candidates),
            *findings.about_failed(self.candidates),
            *findings.about_untimed(self.candidates, self.budget),
        ]
        if self.data.dataset is None:
            return told
        single = [each for each in self.running.values() if each.steps_per_execution == 1]
        step = min(single, key=lambda each: each.step_ms)
        try:
            return findings.about_pipeline(pipeline_timing.time_pipeline(step, self.data.dataset)) + told
        except Exception as error:  # candidates were timed on the first batch only
            return [f"The dataset was not timed: it failed after its first batch. {error_in_words(error)}", *told]


def _policy_of(model: keras.Model) -> str:
    """Returns the most common half-precision policy of a model's layers, or else their policy."""
    names = [layer.dtype_policy.name for layer in keras_layers.layers_by_path(model).values() if layer.weights]
    narrow = [name for name in names if "16" in name]
    return statistics.mode(narrow or names or ["float32"])


def _layers_of(model: keras.Model) -> list[tuple[str, type, str, Any]]:
    return [
        (path, type(layer), layer.dtype_policy.name, getattr(layer, "activation", None))
        for path, layer in keras_layers.layers_by_path(model).items()
        if not keras_layers.inner_layers(layer)
    ]
