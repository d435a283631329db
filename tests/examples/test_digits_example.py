"""The digits example: its parts on made-up runs, and the whole of it, short, in a separate process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib import image as images
from rich.console import Console
from sklearn.datasets import load_digits

from examples import digits, image_classification
from keras_mp.layers import Float32
from tests.helpers.banner import without_banner

ROOT = Path(__file__).parents[2]
POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


def run(policy, seed, accuracy, *, milliseconds=10.0, scales=(), skipped=0):
    """A run as after training. Its model has only the optimizer's counters."""
    model = keras.Sequential()
    model.optimizer = type("Optimizer", (), {"skipped_steps": tf.constant(skipped)})() if scales else object()
    steps = 40
    losses = list(np.geomspace(2.0, 0.1 * (1 + POLICIES.index(policy)), steps))  # apart, so that each can be seen
    # The first quarter is warming up.
    seconds = [9.0] * (steps // 4) + [milliseconds / 1e3] * (3 * steps // 4)
    return digits.Run(policy, seed, model, None, losses, list(scales), seconds, accuracy)


def runs(accuracies):
    """One run for each policy and seed, with these accuracies."""
    made = []
    for policy, own in accuracies.items():
        facts = {
            "float32": {"milliseconds": 20.0},
            "mixed_bfloat16": {"milliseconds": 8.0, "scales": [32768.0] * 20 + [65536.0] * 20},
            "mixed_float16": {"milliseconds": 10.0, "scales": [32768.0] * 20 + [16384.0] * 20, "skipped": 1},
        }[policy]
        made += [run(policy, seed, accuracy, **facts) for seed, accuracy in enumerate(own)]
    return made


def cells(text):
    """The rows of a printed table, without its rules."""
    lines = [line for line in text.splitlines() if re.match("[│┃]", line)]
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines]


def printed(table):
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# The parts


def test_the_table_of_one_seed():
    text = printed(digits.compare(runs({"float32": [0.975], "mixed_bfloat16": [0.98], "mixed_float16": [0.97]})))
    assert cells(text) == [
        ["policy", "test accuracy", "step time", "over float32", "loss scale at the end", "skipped steps"],
        ["float32", "97.50%", "20.0 ms", "1.00", "-", "-"],
        ["mixed_bfloat16", "98.00%", "8.0 ms", "0.40", "65536", "0"],
        ["mixed_float16", "97.00%", "10.0 ms", "0.50", "16384", "1"],
    ]


def test_the_table_of_several_seeds():
    two = {"float32": [0.97, 0.99], "mixed_bfloat16": [0.96, 1.0], "mixed_float16": [0.95, 0.96]}
    text = printed(digits.compare(runs(two)))
    assert "Mean and range over 2 seeds" in text
    rows = cells(text)
    assert rows[1][:2] == ["float32", "98.00%"]
    assert rows[2][1] == "(97.0% to 99.0%)"
    assert rows[5][4:] == ["16384, 16384", "1, 1"]


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        (([0.9], [0.1], [0.1]), "One seed says little about accuracy: --seeds 5 shows the spread."),
        (
            ([0.9, 0.94], [0.91, 0.93], [0.89, 0.91]),
            "The means of both mixed policies lie inside the range of the float32 seeds: the difference is the seeds'.",
        ),
        (
            ([0.9, 0.94], [0.91, 0.93], [0.5, 0.94]),
            "The mean of mixed_float16 lies outside the range of the float32 seeds.",
        ),
        (
            ([0.9, 0.94], [0.95, 0.96], [0.5, 0.94]),
            "The mean of mixed_bfloat16 and mixed_float16 lies outside the range of the float32 seeds.",
        ),
    ],
    ids=["one seed", "inside", "one outside", "both outside"],
)
def test_the_verdict_compares_with_the_spread(accuracies, words):
    assert digits.verdict(runs(dict(zip(POLICIES, accuracies, strict=True)))) == words


@pytest.mark.parametrize("policy", POLICIES)
def test_the_network_computes_in_the_policy_and_ends_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    model = digits.build_model((8, 8, 1), 10)
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert len(convolutions) == 2
    for layer in convolutions:
        assert layer.compute_dtype == policy.removeprefix("mixed_")
        assert layer.kernel.dtype == "float32"
    assert isinstance(model.layers[-1], Float32)
    assert (model.output.dtype, model.output.shape) == ("float32", (None, 10))


def colour_shares(picture, colour):
    """The shares of the left and right half of a picture that are close to a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    near = np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.2
    halves = np.array_split(near, 2, axis=1)
    return [float(half.mean()) for half in halves]


def test_the_picture_shows_each_policy_where_it_belongs(tmp_path):
    path = tmp_path / "deep" / "picture.png"
    digits.draw(runs({"float32": [0.9], "mixed_bfloat16": [0.9], "mixed_float16": [0.9]}), path)
    picture = images.imread(path)
    assert picture.shape[1] > 1200
    for colour in ("#0a84c1", "#e2711d"):  # the mixed policies have a loss and a scale
        left, right = colour_shares(picture, colour)
        assert left > 1e-4
        assert right > 1e-4


def test_the_export_of_the_best_run_is_made_and_said(tmp_path, monkeypatch, capsys):
    """The more accurate of two runs is exported, under its policy."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    test = tf.data.Dataset.from_tensor_slices(
        (rng.random((20, 8, 8, 1), "float32"), np.arange(20, dtype="int32") % 10)
    ).batch(8)
    data = image_classification.ImageSet("digits", test, test, (8, 8, 1), tuple("0123456789"), 20, 20)
    made = []
    for policy, accuracy in (("float32", 0.5), ("mixed_bfloat16", 0.75)):
        keras.config.set_dtype_policy(policy)
        model = digits.build_model((8, 8, 1), 10)
        made.append(digits.Run(policy, 0, model, data, step_seconds=[0.01], accuracy=accuracy))
    digits.export_best(made, Path("saved_models") / "digits")
    said = " ".join(capsys.readouterr().out.split())
    pattern = (
        r"Exported mixed_bfloat16 to saved_models/digits/1\. .* it predicts the model's class for 20 of 20 test images "
        r"\((\d+\.\d\d)% right\); the largest difference of a probability is (\S+)\."
    )
    match = re.fullmatch(pattern, said)
    assert match, said
    serve = tf.saved_model.load("saved_models/digits/1").signatures["serving_default"]
    inputs, labels = (np.concatenate(parts) for parts in zip(*test.as_numpy_iterator(), strict=True))
    answers = serve(image=tf.constant(inputs))["probabilities"].numpy()
    np.testing.assert_allclose(answers.sum(-1), 1, rtol=1e-5)  # the softmax is in the export
    assert float(match[1]) == 100 * np.mean(answers.argmax(-1) == labels)
    assert float(match[2]) < 1e-2


# The whole


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Runs the example as a user does, in a copy, because it writes beside itself."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("output", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_CPP_", "COLUMNS"))}
    environment["TFDS_DATA_DIR"] = str(folder / "data")
    environment["PYTHONPATH"] = str(ROOT)  # keras_mp, where it is not installed; the copy comes before it

    def call(*arguments):
        command = [sys.executable, "-m", "examples.digits", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    call.folder = folder
    return call


def test_the_example_trains_compares_draws_exports_and_verifies(example):
    ran = example("--epochs", "2")
    assert (ran.returncode, without_banner(ran.stderr)) == (0, "")
    assert ran.stdout.startswith("A small convolutional network learns the images of 'digits'")
    rows = {row[0]: row[1:] for row in cells(ran.stdout)}
    assert [policy for policy in rows if policy in POLICIES] == POLICIES
    for policy in POLICIES:
        accuracy, step_time, ratio, scale, skipped = rows[policy]
        assert 50 < float(accuracy.removesuffix("%")) <= 100, f"{policy} learned nothing in two epochs"
        assert float(step_time.removesuffix(" ms")) > 0
        assert float(ratio) > 0
        if policy == "float32":
            assert (scale, skipped) == ("-", "-")
        else:
            assert np.log2(float(scale)) % 1 == 0
            assert int(skipped) >= 0
    # The bar of each policy is full: 22 batches of 64 images in each epoch.
    for policy in POLICIES:
        assert re.search(rf"{policy} .* 44/44 ", ran.stdout)

    picture = images.imread(example.folder / "examples" / "output" / "digits.png")
    assert all(share > 1e-4 for colour in ("#0a84c1", "#e2711d") for share in colour_shares(picture, colour))

    said = " ".join(ran.stdout.split())
    count = int(sum(np.sum(np.arange(len(which)) % 5 == 2) for which in digits_by_class()))
    match = re.search(r"the model's class for (\d+) of (\d+) test images \((\d+\.\d\d)% right\)", said)
    assert match
    assert (int(match[1]), int(match[2])) == (count, count)
    best = max(float(rows[policy][0].removesuffix("%")) for policy in POLICIES)
    # The export runs outside Keras, so a 16-bit tie of two classes may break the other way.
    assert float(match[3]) == pytest.approx(best, abs=1.0)

    assert [entry.name for entry in (example.folder / "saved_models" / "digits").iterdir()] == ["1"]
    serve = tf.saved_model.load(str(example.folder / "saved_models" / "digits" / "1")).signatures["serving_default"]
    answers = serve(image=tf.constant(load_digits().images[..., np.newaxis] / 16, tf.float32))["probabilities"]
    # scikit-learn's images, without the input pipeline, are classified as well.
    assert 100 * np.mean(np.argmax(answers, -1) == load_digits().target) == pytest.approx(best, abs=6)


def digits_by_class():
    return [np.flatnonzero(load_digits().target == label) for label in range(10)]


def test_a_dataset_that_is_not_there_is_told_without_a_traceback(example):
    ran = example("--dataset", "no_such_set")
    assert ran.returncode == 1
    assert re.fullmatch(
        r"There is no dataset 'no_such_set' among the \d+ of tensorflow-datasets\. (Did you mean .*\? )?"
        r"Type --dataset digits for the set that needs no download\. https://\S+ lists them all\.\n",
        without_banner(ran.stderr),
    ), ran.stderr


def test_a_wrong_option_is_refused_by_name(example):
    ran = example("--epochs", "0")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Invalid value for '--epochs'" in ran.stderr
    assert "Traceback" not in ran.stderr
