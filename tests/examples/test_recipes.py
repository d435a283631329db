"""The recipes among the examples: each trains in half precision, and does as its text says."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp
from examples import custom_loop, gan, gradient_penalty, image_classification

ROOT = Path(__file__).parents[2]

# Not every machine gains from every policy.
pytestmark = pytest.mark.filterwarnings("ignore:set_policy:keras_mp.errors.KerasMPWarning")


@pytest.fixture(scope="module", autouse=True)
def _digits_in_a_folder_of_our_own(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


def fit(model, images, steps=None):
    """Trains on a dataset, or on one batch for one step; returns the metrics."""
    dataset = images if isinstance(images, tf.data.Dataset) else tf.data.Dataset.from_tensors(images)
    return model.fit(dataset, steps_per_epoch=steps, shuffle=False, verbose=0).history


def values(variables):
    return [np.array(variable) for variable in variables]


def equal(before, variables):
    """Says for each variable whether it is unchanged, bit for bit."""
    return [np.array_equal(one, np.array(other)) for one, other in zip(before, variables, strict=True)]


def assert_is_a_picture(path, width):
    picture = keras.utils.img_to_array(keras.utils.load_img(path, color_mode="grayscale"))
    assert picture.shape == (width, width, 1)
    assert picture.std() > 10


# A GAN with two optimizers


@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [
        ("mixed_float16", True),
        ("mixed_bfloat16", False),
        pytest.param("mixed_float16", False, marks=pytest.mark.slow),
    ],
)
def test_gan_trains_and_each_optimizer_keeps_its_own_scale(policy, jit_compile):
    images, image_shape = gan.load_images("digits", 16, seed=0)
    model = gan.build(policy, image_shape, jit_compile=jit_compile)
    ours, theirs = model.generator_optimizer, model.discriminator_optimizer
    generator, discriminator = model.generator.trainable_variables, model.discriminator.trainable_variables
    assert model.generator.layers[1].compute_dtype == policy.removeprefix("mixed_")
    before = values(generator), values(discriminator)

    history = fit(model, images, steps=20)
    assert set(history) == {"generator_loss", "discriminator_loss"}
    assert all(0 < losses[0] < 10 for losses in history.values())
    assert not any(equal(before[0], generator) + equal(before[1], discriminator))
    assert [int(each.inner_optimizer.iterations) for each in (ours, theirs)] == [20, 20]
    assert [float(each.loss_scale) for each in (ours, theirs)] == [2.0**15, 2.0**15]
    if jit_compile:
        assert {each.jit_compile_reason for each in (ours, theirs)} == {
            "not compiled: XLA compiles the whole step already"
        }

    # A bad image is in the discriminator's loss, not in the generator's.
    bad = np.array(next(iter(images)))
    bad[3, 0, 0, 0] = np.nan
    before = values(generator), values(discriminator)
    fit(model, bad)
    assert not any(equal(before[0], generator))
    assert all(equal(before[1], discriminator))
    assert [bool(each.last_step_skipped) for each in (ours, theirs)] == [False, True]
    assert [float(each.loss_scale) for each in (ours, theirs)] == [2.0**15, 2.0**14]

    if policy == "mixed_float16":
        # With this scale the generator's gradients overflow float16 on their way through the discriminator.
        ours.dynamic_scale.assign(2.0**24)
        before = values(generator), values(discriminator)
        fit(model, next(iter(images)))
        assert all(equal(before[0], generator))
        assert not any(equal(before[1], discriminator))
        assert [bool(each.last_step_skipped) for each in (ours, theirs)] == [True, False]
        assert [float(each.loss_scale) for each in (ours, theirs)] == [2.0**23, 2.0**14]
    assert [int(each.skipped_steps) for each in (ours, theirs)] == [int(policy == "mixed_float16"), 1]


def test_gan_script(tmp_path, capsys):
    gan.main(policy="mixed_bfloat16", epochs=1, picture=tmp_path / "new" / "gan.png")
    assert_is_a_picture(tmp_path / "new" / "gan.png", width=640)
    printed = capsys.readouterr().out
    assert "mixed_bfloat16" in printed
    assert "2^15, 2^15" in printed


# A gradient penalty


@pytest.fixture(scope="module")
def images():
    """Images that the penalty is taken at: digits mixed with noise."""
    real = next(iter(gan.load_images("digits", 64, seed=0)[0]))
    mixture = tf.random.stateless_uniform((64, 1, 1, 1), (0, 1))
    return mixture * real + (1 - mixture) * tf.random.stateless_uniform(real.shape, (2, 3), -1.0, 1.0)


def make_critic(policy, weights=None):
    with keras_mp.policy_scope(policy):
        critic = gan.build_discriminator((8, 8, 1), dropout=0.0)
    if weights:
        critic.set_weights(weights)
    return critic


def penalty_and_gradients(critic, images, scale, jit_compile=False):
    """The penalty and its gradients for the weights, by the recipe, after scaling and unscaling."""

    @tf.function(jit_compile=jit_compile)
    def compute():
        with tf.GradientTape() as tape:
            penalty = gradient_penalty.gradient_penalty(critic, images, scale)
            scaled = scale * penalty
        *gradients, last = tape.gradient(scaled, critic.trainable_variables)
        assert last is None  # the last bias moves every score alike, and no slope
        return penalty, [tf.cast(gradient, tf.float32) / scale for gradient in gradients]

    penalty, gradients = compute()
    assert penalty.dtype == tf.float32
    return float(penalty), np.concatenate([np.ravel(gradient) for gradient in gradients])


@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [
        ("mixed_float16", False),
        ("mixed_bfloat16", True),
        pytest.param("mixed_float16", True, marks=pytest.mark.slow),
        pytest.param("mixed_bfloat16", False, marks=pytest.mark.slow),
    ],
)
def test_penalty_is_that_of_a_float32_twin(policy, jit_compile, images):
    twin = make_critic("float32")
    kernel = twin.layers[-2].kernel
    kernel.assign(50 * kernel)  # steep, so that the gradient dominates the penalty
    expected, expected_gradients = penalty_and_gradients(twin, images, 1.0)
    assert expected > 1
    critic = make_critic(policy, twin.get_weights())
    penalty, gradients = penalty_and_gradients(critic, images, 2.0**10, jit_compile)
    assert penalty != expected  # or it was not computed in half precision
    assert penalty == pytest.approx(expected, rel=2e-2)
    assert np.linalg.norm(gradients - expected_gradients) < 5e-2 * np.linalg.norm(expected_gradients)


def test_penalty_of_a_linear_critic_by_hand(images):
    critic = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(1)])
    norm = np.linalg.norm(critic.get_weights()[0])
    assert float(gradient_penalty.gradient_penalty(critic, images, 2.0**15)) == pytest.approx((norm - 1) ** 2, rel=1e-5)


def test_small_input_gradients_need_the_scale(images):
    twin = make_critic("float32")
    half = make_critic("mixed_float16", twin.get_weights())
    twin, half = (keras.Sequential([critic, keras.layers.Rescaling(1e-6, dtype="float32")]) for critic in (twin, half))
    expected = np.array(gradient_penalty.input_gradient(twin, images, 1.0))

    def error(scale):
        gradient = gradient_penalty.input_gradient(half, images, scale)
        return np.linalg.norm(gradient - expected) / np.linalg.norm(expected)

    assert error(2.0**15) < 5e-2
    assert error(1.0) > 0.5


def test_wasserstein_gan_trains_and_skips_where_the_penalty_overflows():
    images, image_shape = gan.load_images("digits", 16, seed=0)
    model = gradient_penalty.build("mixed_float16", image_shape, critic_steps=1, jit_compile=True)
    critic, ours, theirs = model.discriminator, model.generator_optimizer, model.discriminator_optimizer
    for optimizer in (ours, theirs):
        optimizer.dynamic_scale.assign(2.0**10)  # from where nothing overflows
    # The critic's last bias cancels in its loss.
    trained = [*model.generator.trainable_variables, *critic.trainable_variables[:-1]]
    before = values(trained)
    history = fit(model, images, steps=20)
    assert set(history) == {"generator_loss", "discriminator_loss", "penalty"}
    assert all(math.isfinite(losses[0]) for losses in history.values())
    assert 0 < history["penalty"][0] < 1
    assert not any(equal(before, trained))
    assert [int(each.inner_optimizer.iterations) for each in (ours, theirs)] == [20, 20]

    # The scale overflows the inner gradient: the critic's step is skipped, the scale falls, the generator trains.
    theirs.dynamic_scale.assign(2.0**24)
    before = values(critic.trainable_variables)
    history = fit(model, next(iter(images)))
    assert not math.isfinite(history["penalty"][0])
    assert all(equal(before, critic.trainable_variables))
    assert [int(each.skipped_steps) for each in (ours, theirs)] == [0, 1]
    assert [float(each.loss_scale) for each in (ours, theirs)] == [2.0**10, 2.0**23]


def test_gradient_penalty_script(tmp_path, capsys):
    gradient_penalty.main(policy="mixed_bfloat16", epochs=1, critic_steps=2, picture=tmp_path / "digits.png")
    assert_is_a_picture(tmp_path / "digits.png", width=640)
    printed = capsys.readouterr().out
    assert "mixed_bfloat16" in printed
    assert "2^15, 2^15" in printed
    losses = re.search(r"│ 1 +│ +(\S+) +│ +(\S+) +│ +(\S+) +│", printed)
    assert all(math.isfinite(float(loss)) for loss in losses.groups())


# A custom loop


def test_custom_loop_resumed_ends_where_it_would_have(tmp_path, capsys):
    # 22 steps an epoch: the first one ends with two gradients of four accumulated.
    arguments = {"policy": "mixed_bfloat16", "accumulate": 4, "epochs": 2}
    custom_loop.main(**arguments, checkpoints=tmp_path / "whole")
    assert "Resumed" not in capsys.readouterr().out
    # The state of a run that was killed in its second epoch.
    killed = tmp_path / "killed"
    killed.mkdir()
    for file in (tmp_path / "whole").glob("ckpt-1.*"):
        shutil.copy(file, killed)
    (killed / "checkpoint").write_text('model_checkpoint_path: "ckpt-1"\nall_model_checkpoint_paths: "ckpt-1"\n')
    custom_loop.main(**arguments, checkpoints=killed, resume=True)
    printed = capsys.readouterr().out
    assert "Resumed after epoch 1" in printed
    assert float(re.search(r"Test accuracy: ([\d.]+)%", printed)[1]) > 50  # chance is 10

    whole, resumed = (tf.train.load_checkpoint(tmp_path / name / "ckpt-2") for name in ("whole", "killed"))
    names = [name for name in whole.get_variable_to_shape_map() if name.endswith("VARIABLE_VALUE")]
    assert sum("inner_optimizer" in name for name in names) > 20
    assert whole.get_tensor("optimizer/step_counter/.ATTRIBUTES/VARIABLE_VALUE") == 44
    assert [name for name in names if whole.get_tensor(name).tobytes() != resumed.get_tensor(name).tobytes()] == []


def test_custom_loop_counts_the_steps_that_overflow():
    data = image_classification.load("digits", 64, drop_remainder=True)
    trainer = custom_loop.Trainer(data.image_shape, data.num_classes, 64, "mixed_float16", accumulate=2)
    optimizer = trainer.optimizer
    optimizer.dynamic_scale.assign(2.0**24)
    result = trainer.train_epoch(data.train)
    assert 1 <= result["skipped"] < 20
    assert result["skipped"] == int(optimizer.skipped_steps)
    assert float(optimizer.loss_scale) == 2.0 ** (24 - result["skipped"])
    # A skipped step does not count towards the two steps of an update.
    assert int(optimizer.inner_optimizer.iterations) == (data.num_train // 64 - result["skipped"]) // 2
    assert int(trainer.epoch) == 1
    assert 0 < result["loss"] < 10
    trainer.train_epoch(data.train)
    assert trainer.test(data) > 0.5


def test_custom_loop_on_two_replicas(tmp_path):
    script = [sys.executable, "-m", "examples.custom_loop", "--strategy", "mirrored", "--replicas", "2"]
    arguments = ["--policy", "mixed_bfloat16", "--epochs", "2", "--checkpoints", str(tmp_path)]
    run = subprocess.run([*script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    accuracy, replicas = re.search(r"Test accuracy: ([\d.]+)%, (\d) replica", run.stdout).groups()
    assert float(accuracy) > 50
    assert replicas == "2"
    assert tf.train.latest_checkpoint(tmp_path).endswith("ckpt-2")
