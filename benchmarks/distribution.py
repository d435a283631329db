"""Training with replicas and XLA, against stock Keras in the same run: `python -m benchmarks.distribution`.

Two replicas share the two cores that one device has for itself. So they show the cost of a second replica, and not its
gain, which takes two devices. Separate processes take compile times, because nothing is compiled there yet.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import keras
import numpy as np
import tensorflow as tf
import typer

import keras_mp
from benchmarks import harness
from benchmarks.harness import Case, Comparison, Grid, Group

__all__ = ["CASES", "SIZES", "Setting", "Size", "count_traces", "epochs", "groups", "make_case", "make_model"]

EPOCHS = 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        name: name in the tables.
        ours: whether by `keras_mp.Model`, not by `keras.Model`.
        replicas: number of replicas; 1 is TensorFlow's default strategy.
        jit_compile: whether XLA compiles.
    """

    name: str
    ours: bool
    replicas: int
    jit_compile: bool


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the workloads.

    Args:
        units: width of the four layers of the perceptron.
        channels: channels of the convolutions.
        batch: rows of all replicas together.
        rounds: turns of each case.
    """

    units: int
    channels: int
    batch: int
    rounds: int


STOCK, STOCK_XLA = "stock, one device", "stock, one device, XLA"
STOCK_TWO = "stock, 2 replicas"
OURS, OURS_XLA = "ours, one device", "ours, one device, XLA"
OURS_TWO, OURS_TWO_XLA = "ours, 2 replicas", "ours, 2 replicas, XLA"
CASES = [
    Setting(STOCK, False, 1, False),
    Setting(STOCK_XLA, False, 1, True),
    Setting(STOCK_TWO, False, 2, False),  # with XLA it fails
    Setting(OURS, True, 1, False),
    Setting(OURS_XLA, True, 1, True),
    Setting(OURS_TWO, True, 2, False),
    Setting(OURS_TWO_XLA, True, 2, True),
]
SIZES = {"full": Size(2048, 64, 256, 20), "quick": Size(32, 4, 16, 2)}
_COMPARISONS = [
    Comparison(OURS, (STOCK,), 1.0),
    Comparison(OURS_XLA, (STOCK_XLA,), 1.0),
    Comparison(OURS_TWO, (STOCK_TWO,), 1.0),
    Comparison(OURS_TWO_XLA, (STOCK_TWO,)),
    Comparison(OURS_TWO_XLA, (STOCK_XLA,)),
    Comparison(OURS_TWO, (OURS,)),
    Comparison(OURS_TWO_XLA, (OURS_XLA,)),
]


@functools.cache  # one for all cases: TensorFlow confuses collective operations of two over the same devices
def _strategy(replicas: int) -> tf.distribute.Strategy:
    if replicas == 1:
        return tf.distribute.get_strategy()
    if len(tf.config.list_physical_devices("GPU")) < replicas and not _logical_devices_are_set():
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * replicas
        )
    kind = "GPU" if len(tf.config.list_physical_devices("GPU")) >= replicas else "CPU"
    return keras_mp.strategy("mirrored", devices=[f"{kind}:{index}" for index in range(replicas)])


def _logical_devices_are_set() -> bool:
    return tf.config.get_logical_device_configuration(tf.config.list_physical_devices("CPU")[0]) is not None


class _Counter(keras.layers.Layer):
    """Passes its input through, and counts how often Python runs it: once for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def call(self, inputs: Any) -> Any:
        self.count += 1
        return inputs


def make_model(
    workload: str, setting: Setting, size: Size, policy: str, strategy: tf.distribute.Strategy
) -> tuple[keras.Model, tuple[int, ...], _Counter]:
    """Returns a compiled model, the shape of a row, and the layer that counts its graphs.

    Args:
        workload: "perceptron" or "convolutions".
        setting: how to train it.
        size: the sizes.
        policy: the name of its policy.
        strategy: where to make it.
    """
    counter = _Counter()
    with strategy.scope(), keras_mp.policy_scope(policy):
        if workload == "perceptron":
            shape: tuple[int, ...] = (size.units // 2,)
            x = inputs = keras.Input(shape)
            for _ in range(4):
                x = keras.layers.Dense(size.units, activation="relu")(x)
        else:
            shape = (32, 32, 3)
            x = inputs = keras.Input(shape)
            for stride in (1, 1, 2, 1):
                x = keras.layers.Conv2D(size.channels, 3, strides=stride, padding="same", activation="relu")(x)
            x = keras.layers.GlobalAveragePooling2D()(x)
        outputs = keras.layers.Dense(10, dtype="float32")(counter(x))
        model = (keras_mp.Model if setting.ours else keras.Model)(inputs, outputs)
        model.compile(
            "adam",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=setting.jit_compile,
        )
    return model, shape, counter


def _data(shape: tuple[int, ...], rows: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((rows, *shape), "float32"), generator.integers(0, 10, rows).astype("int32")


def make_case(workload: str, setting: Setting, size: Size, policy: str) -> Case:
    """Returns one training step of `fit`, on data that is ready.

    Args:
        workload: as for `make_model`.
        setting: as for `make_model`.
        size: as for `make_model`.
        policy: as for `make_model`.
    """
    strategy = _strategy(setting.replicas)
    model, shape, _ = make_model(workload, setting, size, policy, strategy)
    data = _data(shape, size.batch)
    model.fit(*data, batch_size=size.batch, verbose=0)  # builds everything
    # The size is known to the graph, as with `drop_remainder`.
    dataset = tf.data.Dataset.from_tensors(data).repeat()
    distributed = dataset if setting.replicas == 1 else strategy.experimental_distribute_dataset(dataset)
    iterator, step = iter(distributed), model.make_train_function()
    return Case(setting.name, lambda: float(step(iterator)["loss"]))


def groups(size: Size) -> list[Group]:
    """Returns the groups to time.

    Args:
        size: the sizes.
    """

    def group(workload: str, policy: str) -> Group:
        def cases() -> Sequence[Case]:
            _strategy(2)  # before TensorFlow looks at its devices
            return [make_case(workload, setting, size, policy) for setting in CASES]

        return Group(f"{workload}, {policy}, batch {size.batch}", cases, _COMPARISONS, rounds=size.rounds)

    return [
        group(workload, policy)
        for workload in ("perceptron", "convolutions")
        for policy in ("float32", "mixed_bfloat16")
    ]


def epochs(name: str, size: Size) -> dict[str, Any]:
    """Returns the seconds of the first epochs of a perceptron, and the number of graphs made.

    The last batch of each epoch has fewer rows, and no replica has as many as before.

    Args:
        name: name of one of `CASES`.
        size: the sizes.

    Returns:
        "seconds", one for each epoch, and "graphs", how many there were after each.
    """
    setting = next(each for each in CASES if each.name == name)
    strategy = _strategy(setting.replicas)
    model, shape, counter = make_model("perceptron", setting, size, "float32", strategy)
    data = _data(shape, 3 * size.batch + size.batch // 2 - 2)
    seconds, graphs = [], []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        model.fit(*data, batch_size=size.batch, shuffle=False, verbose=0)
        seconds.append(round(time.perf_counter() - start, 3))
        graphs.append(counter.count)
    return {"seconds": seconds, "graphs": graphs}


def count_traces(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Grid]:
    """Makes the tables of the results of `epochs`.

    Args:
        found: its results, by the names of cases.
    """
    columns = [f"epoch {number + 1}" for number in range(EPOCHS)]
    return [
        Grid(
            "Each of the first epochs, with all that is traced and compiled in it",
            "seconds",
            "perceptron, float32",
            columns,
            {name: each["seconds"] for name, each in found.items()},
        ),
        Grid(
            "How often the model was traced by the end of each",
            "times (one of them when it was made)",
            "perceptron, float32",
            columns,
            {name: each["graphs"] for name, each in found.items()},
        ),
    ]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = harness.RESULTS,
    loaded: Annotated[bool, typer.Option("--loaded", help="Run on a busy machine; the results say so.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Next to nothing to compute: print, write nothing.")] = False,
    only: Annotated[str, typer.Option(help="Run only groups with this in their name.")] = "",
) -> None:
    """Time training with 1 and 2 replicas, with XLA and without; write JSON and a table."""
    if context.invoked_subcommand:
        return
    size = "quick" if quick else "full"
    results = harness.begin("distribution", loaded or quick)
    results["grids"] = []
    if not only:
        found = {}
        for setting in CASES:
            print(f"{setting.name}, the first epochs ...", file=sys.stderr, flush=True)
            found[setting.name] = json.loads(harness.run_module("benchmarks.distribution", "one", setting.name, size))
        results["grids"] = [grid.as_json() for grid in count_traces(found)]
    for group in groups(SIZES[size]):
        if only in group.name:
            print(f"{group.name} ...", file=sys.stderr, flush=True)
            results["groups"].append(harness.run_group(group, group.rounds))
            if not quick:
                harness.write(results, output)
    print(harness.table(results))


@app.command(hidden=True)
def one(name: str, size: str) -> None:
    """Print the results of `epochs` as JSON."""
    print(json.dumps(epochs(name, SIZES[size])))


if __name__ == "__main__":
    app()
