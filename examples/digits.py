"""Trains one small network on handwritten digits under three policies, compares them, and exports the best.

python -m examples.digits                  # what `make demo` runs
python -m examples.digits --seeds 5        # accuracy with its spread over seeds
python -m examples.digits --dataset mnist  # any image-classification set of tensorflow-datasets, where downloads work
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # only errors: the screen is for the table

import dataclasses
import pathlib
import statistics
import time
import warnings
from typing import Annotated, Any

import keras
import numpy as np
import rich
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import keras_mp
from examples import image_classification
from keras_mp.errors import KerasMPWarning

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")
OUTPUT = pathlib.Path(__file__).parent / "output"


@dataclasses.dataclass
class Run:
    """The training of one policy with one seed, filled in as it goes."""

    policy: str
    seed: int
    model: keras.Model
    data: image_classification.ImageSet
    losses: list[float] = dataclasses.field(default_factory=list)
    scales: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    accuracy: float = 0.0

    @property
    def skipped_steps(self) -> int:
        """The number of skipped steps."""
        return int(getattr(self.model.optimizer, "skipped_steps", 0))

    @property
    def step_time(self) -> float:
        """The median step in milliseconds, without the first quarter, which traces the step and warms caches."""
        return 1e3 * statistics.median(self.step_seconds[len(self.step_seconds) // 4 :])


class StepRecorder(keras.callbacks.Callback):
    """Records the loss, the loss scale and the time of each training step."""

    def __init__(self, run: Run, advance: Any) -> None:
        super().__init__()
        self._run = run
        self._advance = advance

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Keras has fetched the logs, so the step is over."""
        self._run.step_seconds.append(time.perf_counter() - self._start)
        self._run.losses.append(logs["loss"])
        if isinstance(self.model.optimizer, keras_mp.LossScaleOptimizer):
            self._run.scales.append(float(self.model.optimizer.loss_scale))
        self._advance()


def build_model(image_shape: tuple[int, int, int], num_classes: int) -> keras.Model:
    """Makes a small convolutional network, which returns logits, under the global policy."""
    image = x = keras.Input(image_shape, name="image")
    for filters in (64, 128):
        x = keras_mp.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        # Keras's momentum of 0.99 needs more steps than the demo takes.
        x = keras_mp.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.ReLU()(x)
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.3)(x)
    # Half precision is good enough for the matmul of the logits. Their loss and softmax need float32.
    x = keras_mp.layers.Dense(num_classes)(x)
    return keras.Model(image, keras_mp.layers.Float32(keras.layers.Activation("linear"), name="logits")(x))


def start(policy: str, seed: int, dataset: str, batch_size: int) -> Run:
    """Makes a model and its data. Each policy starts from the same weights and sees the same batches."""
    keras.utils.set_random_seed(seed)
    data = image_classification.load(dataset, batch_size, seed=seed, drop_remainder=True)
    with keras_mp.policy_scope(policy):
        model = build_model(data.image_shape, data.num_classes)
    optimizer: keras.optimizers.Optimizer = keras.optimizers.Adam(1e-3)
    if policy != "float32":
        # By default the scale grows every 2000 steps. The demo is shorter, and shows it grow.
        optimizer = keras_mp.LossScaleOptimizer(optimizer, dynamic_growth_steps=100)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    return Run(policy, seed, model, data)


def train(dataset: str, epochs: int, batch_size: int, seed: int) -> list[Run]:
    """Trains the policies in turn, epoch by epoch. So a machine that slows down slows all of them."""
    runs = [start(policy, seed, dataset, batch_size) for policy in POLICIES]
    columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        steps = runs[0].data.num_train // batch_size
        tasks = {run.policy: progress.add_task(run.policy, total=epochs * steps) for run in runs}
        for epoch in range(epochs):
            for run in runs:
                recorder = StepRecorder(run, lambda policy=run.policy: progress.advance(tasks[policy]))
                run.model.fit(
                    run.data.train,
                    initial_epoch=epoch,
                    epochs=epoch + 1,
                    shuffle=False,  # the pipeline shuffles
                    verbose=0,
                    callbacks=[recorder],
                )
    for run in runs:
        run.accuracy = run.model.evaluate(run.data.test, verbose=0, return_dict=True)["accuracy"]
    return runs


def compare(runs: list[Run]) -> Table:
    """Makes a table of the policies over all seeds."""
    seeds = sorted({run.seed for run in runs})
    title = f"Mean and range over {len(seeds)} seeds" if len(seeds) > 1 else None
    table = Table(title=title)
    table.add_column("policy", no_wrap=True)
    for heading in ("test accuracy", "step time", "over float32", "loss scale at the end", "skipped steps"):
        table.add_column(heading, justify="right")
    float32_time = statistics.median(run.step_time for run in runs if run.policy == "float32")
    for policy in POLICIES:
        mine = [run for run in runs if run.policy == policy]
        accuracies = [run.accuracy for run in mine]
        accuracy = f"{statistics.mean(accuracies):.2%}"
        if len(seeds) > 1:
            accuracy += f"\n({min(accuracies):.1%} to {max(accuracies):.1%})"
        step_time = statistics.median(run.step_time for run in mine)
        scales = [f"{run.scales[-1]:g}" for run in mine if run.scales]
        table.add_row(
            policy,
            accuracy,
            f"{step_time:.1f} ms",
            f"{step_time / float32_time:.2f}",
            ", ".join(scales) or "-",
            ", ".join(str(run.skipped_steps) for run in mine) if scales else "-",
        )
    return table


def verdict(runs: list[Run]) -> str:
    """Says whether the accuracies differ by more than seeds do."""
    by_policy = {policy: [run.accuracy for run in runs if run.policy == policy] for policy in POLICIES}
    if len(by_policy["float32"]) < 2:
        return "One seed says little about accuracy: --seeds 5 shows the spread."
    low, high = min(by_policy["float32"]), max(by_policy["float32"])
    means = {policy: statistics.mean(accuracies) for policy, accuracies in by_policy.items()}
    outside = [policy for policy, mean in means.items() if not low <= mean <= high]
    if outside:
        return f"The mean of {' and '.join(outside)} lies outside the range of the float32 seeds."
    return "The means of both mixed policies lie inside the range of the float32 seeds: the difference is the seeds'."


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Draws loss curves and loss scales of one seed as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip(POLICIES, ("#444444", "#0a84c1", "#e2711d"), strict=True))
    with pyplot.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
        for run in runs:
            smooth = np.convolve(run.losses, np.ones(9) / 9, mode="valid")
            width = 3.5 if run.policy == "float32" else 1.4
            left.plot(smooth, color=colours[run.policy], label=run.policy, lw=width, alpha=0.85)
            if run.scales:
                right.step(range(len(run.scales)), run.scales, color=colours[run.policy], label=run.policy, lw=2)
                falls = [i for i in range(1, len(run.scales)) if run.scales[i] < run.scales[i - 1]]
                right.plot(falls, [run.scales[i] for i in falls], "v", color=colours[run.policy], ms=8)
        left.set(yscale="log", xlabel="step", ylabel="training loss")
        left.set_title("Three policies, one loss curve", loc="left", fontweight="bold")
        right.set_yscale("log", base=2)
        right.set(xlabel="step", ylabel="loss scale")
        right.set_title("The loss scale grows until a gradient overflows", loc="left", fontweight="bold")
        for axes in (left, right):
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)
        pyplot.close(figure)


def export_best(runs: list[Run], folder: pathlib.Path) -> None:
    """Exports the most accurate run, with probabilities as output, and runs the export without Keras."""
    best = max(runs, key=lambda run: (run.accuracy, -run.step_time))
    images, labels = (np.concatenate(parts) for parts in zip(*best.data.test.as_numpy_iterator(), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KerasMPWarning)  # the table has shown the speed
        with keras_mp.policy_scope(best.policy):
            probabilities = keras_mp.layers.Softmax(dtype="float32", name="probabilities")(best.model.output)
        serving = keras.Model(best.model.input, probabilities)
        path = keras_mp.export(serving, folder, precision="mixed")
    report = keras_mp.verify_export(path, serving, images)
    answers = report.answers["probabilities"]
    same = int(np.sum(answers.argmax(-1) == serving.predict(images, verbose=0).argmax(-1)))
    rich.print(
        f"Exported {best.policy} to [bold]{os.path.relpath(path)}[/bold]. Loaded in a fresh process without keras and "
        f"keras_mp, it predicts the model's class for {same} of {len(images)} test images "
        f"({np.mean(answers.argmax(-1) == labels):.2%} right); the largest difference of a probability is "
        f"{report.outputs['probabilities'].largest_error:.1g}."
    )
    if same != len(images):
        raise SystemExit("The export does not predict what the model predicts.")


def main(
    dataset: Annotated[
        str, typer.Option(help="Name of an image-classification set of tensorflow-datasets.")
    ] = "digits",
    epochs: Annotated[int, typer.Option(min=1, help="Times that each policy sees the training images.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    seeds: Annotated[int, typer.Option(min=1, help="How many times to train, with seeds 0, 1, ...")] = 1,
) -> None:
    """Train in float32, mixed_bfloat16 and mixed_float16. Compare, export the best, and verify the export."""
    rich.print(
        f"A small convolutional network learns the images of {dataset!r} in {', '.join(POLICIES[:-1])} and "
        f"{POLICIES[-1]}. Each policy starts from the same weights and sees the same batches.\n"
    )
    runs = []
    # Warnings about the speed of a policy on this hardware come last.
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("once", KerasMPWarning)
        try:
            for seed in range(seeds):
                runs += train(dataset, epochs, batch_size, seed)
        except image_classification.DatasetError as error:
            raise SystemExit(str(error)) from None
    rich.print(compare(runs), verdict(runs), "", sep="\n")
    first = [run for run in runs if run.seed == 0]
    picture = OUTPUT / f"{dataset.replace('/', '-')}.png"
    draw(first, picture)
    rich.print(f"Loss curves and loss scales: [bold]{os.path.relpath(picture)}[/bold]")
    export_best(first, pathlib.Path("saved_models") / dataset.replace("/", "-"))
    hardware = keras_mp.detect()
    rich.print(f"\nFor this hardware [bold]{hardware.recommended_policy}[/bold] is recommended. {hardware.reason}")
    rich.print(*(str(note.message) for note in notes), sep="\n")


if __name__ == "__main__":
    typer.run(main)
