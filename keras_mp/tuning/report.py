"""The results of a search as plain data, the choice among them, and their report."""

import dataclasses
import io
import math
import re
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from keras_mp.errors import KerasMPError

__all__ = ["Candidate", "Tuning", "error_in_words", "recommend", "why_recommended"]

# A smaller gain, as a share of a step, is not worth a change of the program.
_WORTHWHILE = 0.05

# Two medians differ if they are more than this many standard errors apart.
_SIGMAS = 2.0

# Keras and TensorFlow put such lines around the message of an error.
_AROUND = re.compile(
    r"Exception encountered|Arguments received|Graph execution error|Detected at node|File |\[\[\{\{|<stack traces"
)

_ORDER = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train a model, and its measurements.

    Attributes:
        policy: the dtype policy, as `keras_mp.convert` takes it.
        jit_compile: whether XLA compiles the step.
        steps_per_execution: the number of steps in one call.
        current: whether this is the model as it was compiled.
        converted: whether `keras_mp.convert` made it.
        step_ms: median time of one step with a cached batch, in milliseconds, without compilation. None if it was
            not timed.
        ratio: its step time divided by float32's, so 0.5 is twice as fast. The median over all rounds.
        noise: standard error of `ratio`, as a share of it.
        error: largest error of an output against float32 on the same weights, as a share of the output's spread over
            the batch; see `tune`.
        agrees: whether `error` is within the tolerance of the dtype; None if unknown.
        why: why it failed or was not timed to the end. Empty if it was.
    """

    policy: str
    jit_compile: bool
    steps_per_execution: int = 1
    current: bool = False
    converted: bool = False
    step_ms: float | None = None
    ratio: float | None = None
    noise: float = 0.0
    error: float | None = None
    agrees: bool | None = None
    why: str = ""

    @property
    def in_words(self) -> str:
        """The policy and arguments to type, as part of a sentence."""
        several = f", steps_per_execution={self.steps_per_execution}" if self.steps_per_execution != 1 else ""
        return f"{self.policy} with jit_compile={self.jit_compile}{several}"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of `tune`. It prints as a table with the reasons below it.

    Attributes:
        policy: the dtype policy to use, as `keras_mp.convert` takes it.
        jit_compile: the argument of `compile`.
        steps_per_execution: the argument of `compile`.
        reason: why it is recommended, and what to type.
        candidates: a `Candidate` for each configuration.
        findings: sentences that say why half precision does or does not pay here, and other observations.
    """

    policy: str
    jit_compile: bool
    steps_per_execution: int
    reason: str
    candidates: tuple[Candidate, ...]
    findings: list[str]

    def table(self) -> Table:
        """Returns the candidates as a table of `rich`, with a mark on the recommended one."""
        caption = (
            "XLA: jit_compile; steps: steps_per_execution; "
            "over float32: the median over all rounds of a step's time divided by float32's in the same round"
        )
        table = Table("", box=box.SIMPLE, caption=caption)
        for header in ("policy", "XLA", "steps", "ms/step", "over\nfloat32", "error"):
            table.add_column(header, no_wrap=True)
        table.add_column("")
        chosen = recommend(self.candidates)
        for each in self.candidates:
            remarks = ["as it is"] if each.current else []
            if each.agrees is False:
                remarks.append("outputs disagree")
            if each.why:
                remarks.append(each.why.partition(":")[0])
            if each.converted:
                remarks.append("by convert")
            table.add_row(
                "*" if each is chosen else "",
                each.policy,
                "yes" if each.jit_compile else "no",
                str(each.steps_per_execution),
                _number(each.step_ms, ".2f"),
                _number(each.ratio, ".2f"),
                _number(each.error, ".1e"),
                "; ".join(remarks),
            )
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, highlight=False, width=120)
        console.print(self.table())
        for sentence in (self.reason, *self.findings):
            console.print(sentence, markup=False)
        return text.getvalue().rstrip()


def recommend(candidates: Sequence[Candidate]) -> Candidate | None:
    """Returns the fastest candidate whose outputs agree, or a simpler one that is as fast within noise.

    A candidate is faster only by more than 5% and by more than twice the standard error of the two medians. If none is
    faster than the model as it is, the model stays. Among the fastest, float32 comes before bfloat16 and bfloat16
    before float16. Then no XLA comes before XLA, and fewer steps in one call before more.

    Args:
        candidates: all candidates.

    Returns:
        One of them, or None if no timed candidate agrees with float32.

    Example:
    >>> slow = Candidate("float32", False, current=True, step_ms=10.0, ratio=1.0, agrees=True)
    >>> fast = Candidate("mixed_bfloat16", False, converted=True, step_ms=5.0, ratio=0.5, agrees=True)
    >>> recommend([slow, fast]).policy
    'mixed_bfloat16'
    """
    timed = [each for each in candidates if each.ratio is not None and each.agrees and not each.why]
    if not timed:
        return None
    fastest = min(timed, key=_ratio)
    current = next((each for each in timed if each.current), None)
    if current is not None:
        if not _is_faster(fastest, current):
            return current
        timed = [each for each in timed if _is_faster(each, current)]
    return min((each for each in timed if not _is_faster(fastest, each)), key=_preference)


def why_recommended(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """Says why a candidate is recommended, and what to type.

    Args:
        chosen: the candidate that `recommend` returned.
        candidates: all candidates.
    """
    timed = [each for each in candidates if each.ratio is not None and each.agrees and each is not chosen]
    fastest = min(timed, key=_ratio, default=None)
    if chosen.current:
        stay = f"Leave the model as it is, {chosen.in_words}: a step takes {chosen.step_ms:.2f} ms"
        if fastest is None:
            return f"{stay}, and nothing else was timed."
        if _ratio(fastest) < _ratio(chosen):
            return f"{stay}, and {_figures(fastest)} is not faster by more than 5% and the noise of the measurement."
        return f"{stay}, and the fastest other, {_figures(fastest)}, is not faster."
    current = next((each for each in candidates if each.current and each.ratio is not None), None)
    beside = ""
    if current is not None:
        beside = (
            f", {_ratio(current) / _ratio(chosen):.2f} times as fast as the model as it is ({current.step_ms:.2f} ms)"
        )
    float32 = min((each for each in timed if each.policy == "float32"), key=_ratio, default=None)
    if float32 is not None and chosen.policy != "float32":
        gain = _ratio(float32) / _ratio(chosen)
        beside += f", {gain:.2f} times as fast as the fastest in float32, {_figures(float32)}"
    if chosen.error:
        beside += f"; outputs differ from float32 by {chosen.error:.1e} of their spread"
    took = f"A step takes {chosen.step_ms:.2f} ms in {chosen.in_words}{beside}."
    if not chosen.converted:
        return (
            f"{took} Type model.compile(..., jit_compile={chosen.jit_compile}, "
            f"steps_per_execution={chosen.steps_per_execution})."
        )
    # `convert` returns a compiled model with its own optimizer.
    return (
        f'{took} Type model = keras_mp.convert(model, "{chosen.policy}"), model.jit_compile = {chosen.jit_compile} and '
        f"model.steps_per_execution = {chosen.steps_per_execution}."
    )


def error_in_words(error: Exception) -> str:
    """Returns the message of an error in one line, without the lines that Keras puts around it.

    Args:
        error: any exception.
    """
    text = re.sub(r"\x1b\[\d*m|\{\{function_node [^}]*\}\} ", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _AROUND.match(line)]
    words = lines[0] if lines else ""
    words = words if len(words) <= 300 else f"{words[:300]}..."
    return words if isinstance(error, KerasMPError) else f"{type(error).__name__}: {words}"


def _is_faster(one: Candidate, other: Candidate) -> bool:
    margin = max(_WORTHWHILE, _SIGMAS * math.hypot(one.noise, other.noise))
    return _ratio(one) < _ratio(other) * (1 - margin)


def _preference(candidate: Candidate) -> tuple[int, bool, int]:
    place = _ORDER.index(candidate.policy) if candidate.policy in _ORDER else len(_ORDER)
    return place, candidate.jit_compile, candidate.steps_per_execution


def _ratio(candidate: Candidate) -> float:
    return math.inf if candidate.ratio is None else candidate.ratio


def _figures(candidate: Candidate) -> str:
    return f"{candidate.in_words} ({candidate.step_ms:.2f} ms)"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
