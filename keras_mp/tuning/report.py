"""What was timed, which of it to use, and how that is told: plain data and pure functions of it."""

import dataclasses
import io
import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["Candidate", "Tuning", "recommend", "why_recommended"]

# What a candidate has to be faster by, as a share of its step, for anybody to change a program for it.
_WORTHWHILE = 0.05

# Two medians are told apart where they differ by more than this many standard errors.
_SIGMAS = 2.0

_ORDER = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train a model, and what came of trying it.

    Attributes:
        policy: the dtype policy, as `keras_mp.convert` takes it.
        jit_compile: whether XLA compiles the step.
        steps_per_execution: how many steps run in one call.
        current: whether this is the model as it is and was compiled.
        converted: whether it is a conversion by `keras_mp.convert`, not the model with its own layers.
        step_ms: median time of one step with a cached batch, in milliseconds, compilation not included. None where it
            was not timed.
        ratio: step time over that in float32, so that 0.5 is twice as fast: the median of those of all rounds.
        noise: standard error of that median, as a share of it.
        error: largest error of an output against float32 on the same weights, as a share of what the output varies by
            over the batch; see `tune`.
        agrees: whether that is within the tolerance of the dtype; None where it is not known.
        why: in words, why it failed or was not timed to the end. Empty where it was.
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
        """What to type, for sentences."""
        several = f", steps_per_execution={self.steps_per_execution}" if self.steps_per_execution != 1 else ""
        return f"{self.policy} with jit_compile={self.jit_compile}{several}"


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What `tune` found; printed, it is a table with the reasons below it.

    Attributes:
        policy: the dtype policy to use, as `keras_mp.convert` takes it.
        jit_compile: what to give `compile`.
        steps_per_execution: what to give `compile`.
        reason: why, and what to type.
        candidates: a `Candidate` for everything that was considered.
        findings: sentences: why 16 bits do or do not pay here, and what else was seen.
    """

    policy: str
    jit_compile: bool
    steps_per_execution: int
    reason: str
    candidates: tuple[Candidate, ...]
    findings: list[str]

    def table(self) -> Table:
        """The candidates as a table of `rich`, the recommended one marked."""
        caption = (
            "XLA: jit_compile; steps: steps_per_execution; "
            "over float32: the median over all rounds of a step's time over that in float32 of the same round"
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
    """The candidate to use: the fastest whose outputs agree, unless a simpler one is as fast within noise.

    Faster counts only by more than a twentieth, and by more than twice the standard error of the two medians. The
    model as it is stays where nothing is faster in this sense. Otherwise, among those that are faster than it and that
    nothing is faster than, float32 comes before bfloat16 and that before float16; no XLA before XLA; and fewer steps in
    one call.

    Args:
        candidates: what was tried.

    Returns:
        One of them, or None where none was timed that agrees with float32.

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
    """In words why a candidate is recommended, and what to type.

    Args:
        chosen: what `recommend` answered with.
        candidates: all there were.
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
        beside += f"; outputs differ from float32 by {chosen.error:.1e} of what they vary by"
    took = f"A step takes {chosen.step_ms:.2f} ms in {chosen.in_words}{beside}."
    if not chosen.converted:
        return (
            f"{took} Type model.compile(..., jit_compile={chosen.jit_compile}, "
            f"steps_per_execution={chosen.steps_per_execution})."
        )
    # A conversion is compiled, with an optimizer of its own.
    return (
        f'{took} Type model = keras_mp.convert(model, "{chosen.policy}"), model.jit_compile = {chosen.jit_compile} and '
        f"model.steps_per_execution = {chosen.steps_per_execution}."
    )


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
