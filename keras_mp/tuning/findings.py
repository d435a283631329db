"""Why 16 bits do or do not pay, in sentences made of figures: pure functions of what was measured and counted."""

import dataclasses
import math
import re
from collections.abc import Sequence

from keras_mp.hardware import Hardware
from keras_mp.hardware.matmul_timing import ProductTimes
from keras_mp.tuning.matmul_counts import Product, Work
from keras_mp.tuning.report import Candidate

__all__ = [
    "Kernel",
    "Pipeline",
    "about_dimensions",
    "about_failed",
    "about_hardware",
    "about_pipeline",
    "about_products",
    "about_sampling",
    "about_share",
    "about_short_steps",
    "about_small_products",
    "about_untimed",
    "listed",
]


# About what a product of three matrices' sides of 128 takes: below it, starting it and casting cost more than it.
_SMALL_FLOPS = 2.0 * 128**3

# Tensor cores and the CPU's tiles work on blocks whose sides are multiples of it.
_BLOCK = 8

# From this share on, what a step waits for its data is worth to be mended first.
_WAITS = 0.1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The weights of a layer that go into a product.

    Attributes:
        path: of the layer.
        shape: of its kernel, inputs before outputs.
    """

    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What the user's dataset costs a step.

    Attributes:
        cached_ms: a step with one batch that is kept.
        fed_ms: a step with the dataset.
        alone_ms: a batch of the dataset, without any step.
    """

    cached_ms: float
    fed_ms: float
    alone_ms: float


def about_products(times: Sequence[ProductTimes]) -> list[str]:
    """What a bare product takes by dtype, which is the most that 16 bits can gain.

    Args:
        times: of each 16-bit dtype.
    """
    sentences = []
    for each in times:
        gains = "gains enough to pay for casts" if each.gains else "gains nothing once casts are paid for"
        sentences.append(f"On this {each.device} {each}: {each.dtype} {gains}.")
    return sentences


def about_hardware(here: Hardware) -> list[str]:
    """What this hardware has, or lacks, that 16 bits need.

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
    """How much of the step in float32 is not spent in products, and what 16 bits can gain at most for it.

    Args:
        work: the products of a step.
        step_ms: time of a step in float32.
        times: of each 16-bit dtype.
    """
    if not work.flops:
        return ["The step has no matrix product and no convolution, of which alone 16 bits make a faster one."]
    if not times:
        return []
    if not work.complete:
        left = listed([name for name in work.uncounted + work.loops if "gradient" not in name] or work.uncounted)
        return [
            f"The step's products are {_operations(work.flops)} operations at least; which share of its time they "
            f"take was not estimated, for the graph does not tell how much {left or 'a loop'} computes."
        ]
    first = times[0]
    rate = 2.0 * first.size**3 / first.float32_ms  # operations in a millisecond
    share = min(1.0, work.flops / rate / step_ms)
    sentences = [
        f"By estimate (a step's {_operations(work.flops)} operations in products, at the rate of the product above), "
        f"{1 - share:.0%} of a float32 step's {step_ms:.2f} ms pass outside products, in casts, activations, "
        "normalization, the optimizer and Python, which faster products do not shorten."
    ]
    best = max(times, key=lambda each: each.ratio)
    if best.gains:
        most = 1 / (1 - share + share / best.ratio)
        sentences[0] += (
            f" Faster {best.dtype} products alone make the step {most:.1f} times as fast; other layers, gradients and "
            "updates, and less to move in memory, come on top of that, and are in what was timed."
        )
    return sentences


def about_small_products(work: Work, kernels: Sequence[Kernel], names: frozenset[str] = frozenset()) -> list[str]:
    """Layers whose products are too small to gain from 16 bits.

    Args:
        work: the products of a step.
        kernels: of the layers that multiply, by which they are named.
        names: of all layers, by which other products are.
    """
    forward = [product for product in work.products if product.is_forward]
    small = [product for product in forward if product.flops < _SMALL_FLOPS]
    if not small:
        return []
    share = sum(product.flops for product in small) / sum(product.flops for product in forward)
    if share < 0.5 and len(small) <= len(forward) / 2:
        return []
    return [
        f"{len(small)} of {len(forward)} products of the forward pass are too small to gain from 16 bits, below "
        f"{_operations(_SMALL_FLOPS)} operations: {listed([_layer(each, kernels, names) for each in small])}. Larger "
        "batches make them larger: try batch_size four times as large."
    ]


def about_dimensions(
    kernels: Sequence[Kernel], rows: int, fast_dtypes: frozenset[str], given: frozenset[int] = frozenset()
) -> list[str]:
    """Layers whose sizes do not fill the blocks that fast products work on.

    Args:
        kernels: of the layers that multiply.
        rows: of a batch.
        fast_dtypes: what the hardware is fast at. Where it is nothing, sizes do not matter.
        given: sizes that the data have, as features and classes, which nobody is free to choose.
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
            f"Products are fastest where all sizes are multiples of {_BLOCK}; {len(uneven)} of {len(kernels)} kernels "
            f"have others: {listed(shown)}. Where you are free to, round up: {-(-size // _BLOCK) * _BLOCK} units "
            f"instead of {size}."
        )
    if rows % _BLOCK:
        sentences.append(
            f"A batch of {rows} rows is no multiple of {_BLOCK}; type batch_size={-(-rows // _BLOCK) * _BLOCK}."
        )
    return sentences


def about_sampling(differ: float, runs: int) -> list[str]:
    """How a model that samples was compared.

    Args:
        differ: how far two runs in float32 are apart, as a share of what outputs vary by. 0 for one that does not.
        runs: how many were averaged.
    """
    if not differ:
        return []
    return [
        f"The model samples when it is called: two runs in float32 on the same batch differ by {differ:.1e} of what "
        f"outputs vary by. So outputs are means of {runs} runs, and agree within what such means differ by in float32."
    ]


def about_pipeline(pipeline: Pipeline) -> list[str]:
    """Whether a step waits for its data.

    Args:
        pipeline: what was timed.
    """
    waits = pipeline.fed_ms - pipeline.cached_ms
    figures = (
        f"a step takes {pipeline.fed_ms:.2f} ms with your dataset and {pipeline.cached_ms:.2f} ms with a cached batch; "
        f"the dataset alone takes {pipeline.alone_ms:.2f} ms for a batch"
    )
    if waits < _WAITS * pipeline.fed_ms or pipeline.alone_ms < waits / 2:
        return [f"The input pipeline keeps up: {figures}."]
    return [
        f"The input pipeline is the bottleneck: {figures}. So {waits / pipeline.fed_ms:.0%} of the time passes in "
        "waiting for data, which no policy shortens. Type dataset.cache() after what is the same every epoch, "
        ".map(..., num_parallel_calls=tf.data.AUTOTUNE), and .prefetch(tf.data.AUTOTUNE) at the end."
    ]


def about_short_steps(candidates: Sequence[Candidate]) -> list[str]:
    """What several steps in one call gain, where steps are short.

    Args:
        candidates: what was tried.
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
        f"steps_per_execution={best.steps_per_execution}. What is between, Python takes between steps."
    ]


def about_untimed(candidates: Sequence[Candidate], budget: float) -> list[str]:
    """What was not timed for want of time, so that the answer is a partial one.

    Args:
        candidates: all there were.
        budget: in seconds.
    """
    untimed = [each for each in candidates if each.step_ms is None and each.why.startswith("not timed")]
    if not untimed:
        return []
    return [
        f"Not timed within {budget:g} seconds: {listed([each.in_words for each in untimed])}. Give a budget of "
        f"{4 * budget:g} seconds to have them timed, or name the policies that you would use."
    ]


def about_failed(candidates: Sequence[Candidate]) -> list[str]:
    """Why some candidates could not be timed, which their table has no room for.

    Args:
        candidates: all there were.
    """
    failed = [(each.in_words, each.why.partition(": ")) for each in candidates if each.why.startswith("failed")]
    return [f"{name} {what}: {why}" for name, (what, _, why) in failed]


def _layer(product: Product, kernels: Sequence[Kernel], names: frozenset[str]) -> str:
    """The path of the layer that a product belongs to, or else the scope of its name."""
    scopes = [_without_number(scope, names) for scope in product.name.split("/")[:-1]]
    # TensorFlow adds a number to a name that is taken, and a layer's own name may end in one.
    parts = {*scopes, *(re.sub(r"_\d+$", "", scope) for scope in scopes)}
    for kernel in kernels:
        if math.prod(kernel.shape) == math.prod(product.factor) and kernel.path.split("/")[-1] in parts:
            return kernel.path
    return "/".join(scopes) or product.name


def _operations(flops: float) -> str:
    for unit, size in (("trillion", 1e12), ("billion", 1e9)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops / 1e6:.3g} million"


def listed(names: Sequence[str]) -> str:
    """The first five of some names, each once, and how many more there are."""
    names = list(dict.fromkeys(names))
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _without_number(scope: str, names: frozenset[str]) -> str:
    """The layer's own name, where TensorFlow or the copy of the model has added a number to it."""
    bare = re.sub(r"_\d+$", "", scope)
    return bare if scope not in names and bare in names else scope
