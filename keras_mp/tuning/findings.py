"""Turns measurements into sentences that say why half precision does or does not pay."""

import dataclasses
import math
import re
from collections.abc import Sequence

from keras_mp.hardware import Hardware
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.tuning.matmul_counts import Matmul, Work
from keras_mp.tuning.report import Candidate

__all__ = [
    "Kernel",
    "Pipeline",
    "about_dimensions",
    "about_failed",
    "about_hardware",
    "about_matmuls",
    "about_pipeline",
    "about_sampling",
    "about_share",
    "about_short_steps",
    "about_small_matmuls",
    "about_untimed",
    "listed",
]


# Operations of a 128 x 128 matmul. Below it, the launch and the casts cost more than the matmul.
_SMALL_FLOPS = 2.0 * 128**3

# Tensor cores and a CPU's tiles work on blocks with sides of this multiple.
_BLOCK = 8

# From this share of a step on, waiting for data is the first thing to fix.
_WAITS = 0.1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The weights that a layer multiplies by.

    Attributes:
        path: the layer's path.
        shape: the kernel's shape, inputs before outputs.
    """

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Times of a step with and without the user's dataset.

    Attributes:
        cached_ms: a step with one cached batch.
        fed_ms: a step with the dataset.
        alone_ms: a batch of the dataset without a step.
    """

    cached_ms: float
    fed_ms: float
    alone_ms: float


def about_matmuls(times: Sequence[ProductTimes]) -> list[str]:
    """Says how long a bare matmul takes in each dtype: an upper limit of the gain.

    Args:
        times: a measurement for each 16-bit dtype.
    """
    sentences = []
    for each in times:
        gains = "gains enough to pay for casts" if each.gains else "gains nothing once casts are paid for"
        sentences.append(f"On this {each.device} {each}: {each.dtype} {gains}.")
    return sentences


def about_hardware(here: Hardware) -> list[str]:
    """Says whether this hardware is fast in half precision.

    Args:
        here: the devices that the model trains on.
    """
    if here.fast_dtypes:
        return [here.reason]
    if here.accelerators:
        need = "NVIDIA GPUs multiply faster in float16 from compute capability 7.0 on, and in bfloat16 from 8.0 on"
    else:
        need = "CPUs with AMX-BF16 multiply faster in bfloat16, some with AVX512-BF16 do, and GPUs and TPUs do"
    return [f"{here.reason} {need}. Type keras-mp doctor on a machine to see what it has."]


def about_share(work: Work, step_ms: float, times: Sequence[ProductTimes]) -> list[str]:
    """Says how much of a float32 step is not spent in matmuls, and what faster matmuls can gain.

    Args:
        work: the matmuls of a step.
        step_ms: time of a step in float32.
        times: a measurement for each 16-bit dtype.
    """
    if not work.flops:
        return ["The step has no matmul and no convolution. Half precision makes only these faster."]
    if not times:
        return []
    if not work.complete:
        left = listed([name for name in work.uncounted + work.loops if "gradient" not in name] or work.uncounted)
        return [
            f"The step's matmuls are {_operations(work.flops)} operations at least. Their share of the step's time was "
            f"not estimated: the graph does not tell how much {left or 'a loop'} computes."
        ]
    first = times[0]
    rate = 2.0 * first.size**3 / first.float32_ms  # operations in a millisecond
    share = min(1.0, work.flops / rate / step_ms)
    sentences = [
        f"By estimate, {1 - share:.0%} of a float32 step's {step_ms:.2f} ms pass outside matmuls: in casts, "
        "activations, normalization, the optimizer and Python. Faster matmuls do not shorten them. The estimate takes "
        f"the step's {_operations(work.flops)} operations in matmuls at the rate of the matmul above."
    ]
    best = max(times, key=lambda each: each.ratio)
    if best.gains:
        most = 1 / (1 - share + share / best.ratio)
        sentences[0] += (
            f" Faster {best.dtype} matmuls alone make the step {most:.1f} times as fast. Savings of memory traffic in "
            "other layers, gradients and updates add to that; the timed steps include them."
        )
    return sentences


def about_small_matmuls(work: Work, kernels: Sequence[Kernel], names: frozenset[str] = frozenset()) -> list[str]:
    """Names layers whose matmuls are too small to gain from half precision.

    Args:
        work: the matmuls of a step.
        kernels: the layers' kernels, which give matmuls their layer.
        names: the names of all layers, for matmuls without a kernel.
    """
    forward = [matmul for matmul in work.matmuls if matmul.is_forward]
    small = [matmul for matmul in forward if matmul.flops < _SMALL_FLOPS]
    if not small:
        return []
    share = sum(matmul.flops for matmul in small) / sum(matmul.flops for matmul in forward)
    if share < 0.5 and len(small) <= len(forward) / 2:
        return []
    return [
        f"{len(small)} of {len(forward)} matmuls of the forward pass are too small to gain from half precision, below "
        f"{_operations(_SMALL_FLOPS)} operations: {listed([_layer(each, kernels, names) for each in small])}. Larger "
        "batches make them larger: try batch_size four times as large."
    ]


def about_dimensions(
    kernels: Sequence[Kernel], rows: int, fast_dtypes: frozenset[str], given: frozenset[int] = frozenset()
) -> list[str]:
    """Names layers whose sizes do not fill the blocks of fast matmuls.

    Args:
        kernels: the layers' kernels.
        rows: the rows of a batch.
        fast_dtypes: dtypes that the hardware is fast at. If there are none, sizes do not matter.
        given: sizes set by the data, such as features and classes.
    """
    if not fast_dtypes:
        return []
    sentences = []

    def uneven_sizes(kernel: Kernel) -> list[int]:
        return [size for size in reversed(kernel.shape[-2:]) if size % _BLOCK and size not in given]

    uneven = [kernel for kernel in kernels if uneven_sizes(kernel)]
    if uneven:
        shown = [f"{kernel.path} ({' x '.join(map(str, kernel.shape))})" for kernel in uneven]
        size = uneven_sizes(uneven[0])[0]
        sentences.append(
            f"Matmuls are fastest if all sizes are multiples of {_BLOCK}; {len(uneven)} of {len(kernels)} kernels "
            f"have others: {listed(shown)}. Round up where you can: {-(-size // _BLOCK) * _BLOCK} units instead of "
            f"{size}."
        )
    if rows % _BLOCK:
        sentences.append(
            f"A batch of {rows} rows is no multiple of {_BLOCK}; type batch_size={-(-rows // _BLOCK) * _BLOCK}."
        )
    return sentences


def about_sampling(differ: float, runs: int) -> list[str]:
    """Says how a model that samples was compared.

    Args:
        differ: the difference of two float32 runs, as a share of the outputs' spread. 0 if the model does not sample.
        runs: the number of averaged runs.
    """
    if not differ:
        return []
    return [
        f"The model samples when it is called: two float32 runs on the same batch differ by {differ:.1e} of the "
        f"outputs' spread. So means of {runs} runs are compared, and agree as closely as such means do in float32."
    ]


def about_pipeline(pipeline: Pipeline) -> list[str]:
    """Says whether a step waits for its data.

    Args:
        pipeline: the measured times.
    """
    waits = pipeline.fed_ms - pipeline.cached_ms
    figures = (
        f"a step takes {pipeline.fed_ms:.2f} ms with your dataset and {pipeline.cached_ms:.2f} ms with a cached batch; "
        f"the dataset alone takes {pipeline.alone_ms:.2f} ms for a batch"
    )
    if waits < _WAITS * pipeline.fed_ms or pipeline.alone_ms < waits / 2:
        return [f"The input pipeline keeps up: {figures}."]
    return [
        f"The input pipeline is the bottleneck: {figures}. So {waits / pipeline.fed_ms:.0%} of the time is "
        "spent waiting for data, which no policy shortens. Type dataset.cache() after the steps that do not change, "
        ".map(..., num_parallel_calls=tf.data.AUTOTUNE), and .prefetch(tf.data.AUTOTUNE) at the end."
    ]


def about_short_steps(candidates: Sequence[Candidate]) -> list[str]:
    """Says what several steps in one call gain if steps are short.

    Args:
        candidates: all candidates.
    """
    several = [each for each in candidates if each.steps_per_execution > 1 and each.step_ms is not None]
    if not several:
        return []
    best = min(several, key=lambda each: each.step_ms or 0.0)
    same = (best.policy, best.jit_compile, best.converted)
    alone = [
        each.step_ms
        for each in candidates
        if (each.policy, each.jit_compile, each.converted) == same and each.steps_per_execution == 1
    ]
    if not alone or alone[0] is None or best.step_ms is None:
        return []
    if best.step_ms > (1 - _WAITS) * alone[0]:
        return []
    return [
        f"Steps are short: {alone[0]:.2f} ms in {best.policy} one by one and {best.step_ms:.2f} ms with "
        f"steps_per_execution={best.steps_per_execution}. The difference is Python's time between steps."
    ]


def about_untimed(candidates: Sequence[Candidate], budget: float) -> list[str]:
    """Names the candidates that there was no time for.

    Args:
        candidates: all candidates.
        budget: the time limit in seconds.
    """
    untimed = [each for each in candidates if each.step_ms is None and each.why.startswith("not timed")]
    if not untimed:
        return []
    return [
        f"Not timed within {budget:g} seconds: {listed([each.in_words for each in untimed])}. Give a budget of "
        f"{4 * budget:g} seconds to time them, or name only the policies that you would use."
    ]


def about_failed(candidates: Sequence[Candidate]) -> list[str]:
    """Says why some candidates could not be timed. Their table has no room for it.

    Args:
        candidates: all candidates.
    """
    failed = [(each.in_words, each.why.partition(": ")) for each in candidates if each.why.startswith("failed")]
    return [f"{name} {what}: {why}" for name, (what, _, why) in failed]


def _layer(matmul: Matmul, kernels: Sequence[Kernel], names: frozenset[str]) -> str:
    """Returns the path of the layer that a matmul belongs to, or else its name's scope."""
    scopes = [_without_number(scope, names) for scope in matmul.name.split("/")[:-1]]
    # TensorFlow numbers a name that is taken, and a layer's name may end in a number.
    parts = {*scopes, *(re.sub(r"_\d+$", "", scope) for scope in scopes)}
    for kernel in kernels:
        if math.prod(kernel.shape) == math.prod(matmul.factor) and kernel.path.split("/")[-1] in parts:
            return kernel.path
    return "/".join(scopes) or matmul.name


def _operations(flops: float) -> str:
    for unit, size in (("trillion", 1e12), ("billion", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} million"


def listed(names: Sequence[str]) -> str:
    """Returns the first five distinct names, and how many more there are."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _without_number(scope: str, names: frozenset[str]) -> str:
    """Returns the layer's name without the number that TensorFlow or the copy added."""
    bare = re.sub(r"_\d+$", "", scope)
    return bare if scope not in names and bare in names else scope
