"""The optimizer's state through files: under a strategy, from Keras's own wrapper, and through SIGKILL."""

import math
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_mp

NAN = math.nan


def make_model(inner, wrapper=keras_mp.LossScaleOptimizer, **arguments):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(wrapper(inner, **arguments), loss="mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def batches(bad=()):
    random = np.random.default_rng(1)
    x, y = random.normal(size=(8, 4, 3)).astype("float32"), random.normal(size=(8, 4, 1)).astype("float32")
    x[list(bad), -1] = NAN
    return x, y


def train(model, steps, bad=()):
    x, y = (np.concatenate(each[list(steps)]) for each in batches(bad))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0)


def state(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def through_file(model, how, folder, make):
    """The model after a round trip; `make` makes one like it."""
    path = str(folder / f"saved{how}")
    if how == ".keras":
        model.save(path)
        return keras.models.load_model(path)
    restored = make()
    if how == ".weights.h5":
        # Keras saves the optimizer of a compiled model with its weights.
        model.save_weights(path)
        restored.load_weights(path)
    else:
        tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(path)
        tf.train.Checkpoint(model=restored, optimizer=restored.optimizer).read(path).assert_consumed()
    return restored


FILES = [".keras", ".weights.h5", "checkpoint"]


def test_the_step_after_a_restore_on_replicas_is_the_step_that_would_have_come(mirrored, tmp_path):
    """Promise 5, with a bad row on the second replica before and after."""

    def make():
        inner = keras.optimizers.AdamW(
            0.01, gradient_accumulation_steps=2, use_ema=True, ema_overwrite_frequency=3, global_clipnorm=0.5
        )
        return make_model(inner, dynamic_growth_steps=3, hysteresis=2)

    with mirrored(2).scope():
        model = make()
        train(model, range(5), bad=[3, 6])
        all_restored = [through_file(model, how, tmp_path, make) for how in FILES]
    for restored in all_restored:
        assert type(restored.optimizer) is keras_mp.LossScaleOptimizer
        assert_same(state(model), state(restored))
    for one in (model, *all_restored):
        train(one, range(5, 8), bad=[3, 6])
    assert int(model.optimizer.skipped_steps) == 2
    for restored in all_restored:
        assert_same(state(model), state(restored))
        for variable in [*restored.variables, *restored.optimizer.variables]:
            first, second = mirrored(2).experimental_local_results(variable.value)
            np.testing.assert_array_equal(first, second)


def nadam_resumed(wrapper, how, folder):
    def make():
        return make_model(keras.optimizers.Nadam(0.01), wrapper)

    model = make()
    train(model, range(4))
    restored = through_file(model, how, folder, make)
    for one in (model, restored):
        train(one, range(4, 8))
    return model, restored


@pytest.mark.parametrize("how", FILES)
def test_nadam_resumes(how, tmp_path):
    """Its running product of momenta is in no list of variables of Keras's."""
    model, restored = nadam_resumed(keras_mp.LossScaleOptimizer, how, tmp_path)
    assert_same(state(model), state(restored))


@pytest.mark.stock_defect
@pytest.mark.parametrize("how", [".keras", ".weights.h5"])
def test_stock_nadam_resumes(how, tmp_path):
    model, restored = nadam_resumed(keras.optimizers.LossScaleOptimizer, how, tmp_path)
    assert_same(state(model), state(restored))


def trained_stock_model():
    model = make_model(keras.optimizers.Adam(0.01), keras.optimizers.LossScaleOptimizer, dynamic_growth_steps=3)
    train(model, range(5), bad=[1])
    return model


def ours_from(stock, how, folder):
    """Our optimizer on a model like it, with the state of a file that has its."""
    path = str(folder / f"saved{how}")
    ours = make_model(keras.optimizers.Adam(0.01), dynamic_growth_steps=3, jit_compile=False)
    if how == ".weights.h5":
        stock.save_weights(path)
        ours.load_weights(path)
    elif how == "checkpoint":
        tf.train.Checkpoint(model=stock, optimizer=stock.optimizer).write(path)
        # What is ours alone is not in the file, and keeps its initial value.
        checkpoint = tf.train.Checkpoint(model=ours, optimizer=ours.optimizer)
        checkpoint.read(path).expect_partial()
    else:
        stock.save(path)
        loaded = keras.models.load_model(path)
        store = {}
        loaded.optimizer.save_own_variables(store)
        ours.set_weights(loaded.get_weights())
        ours.optimizer.load_own_variables(store)
    return ours


@pytest.mark.parametrize("how", FILES)
def test_training_goes_on_from_a_file_of_keras_wrapper(how, tmp_path):
    """Promises 5 and 9: scale, its counter and the slots carry over, and the next steps are the same."""
    stock = trained_stock_model()
    ours = ours_from(stock, how, tmp_path)
    for _ in range(2):
        assert float(ours.optimizer.loss_scale) == float(stock.optimizer.dynamic_scale)
        assert int(ours.optimizer.step_counter) == int(stock.optimizer.step_counter)
        assert int(ours.optimizer.skipped_steps) == 0
        assert int(ours.optimizer.iterations) == int(stock.optimizer.inner_optimizer.iterations) > 0
        theirs = [*stock.variables, *stock.optimizer.inner_optimizer.variables]
        mine = [*ours.variables, *ours.optimizer.inner_optimizer.variables]
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=one.path)
        train(stock, range(5, 8))
        train(ours, range(5, 8))


@pytest.mark.parametrize(
    ("how", "ruined"),
    [
        pytest.param(how, ruined, marks=() if number == other else pytest.mark.slow)
        for number, how in enumerate(FILES)
        for other, ruined in enumerate((0.0, math.inf, NAN))
    ],
)
def test_a_ruined_scale_from_a_file_of_keras_wrapper_comes_back_inside_the_bounds(how, ruined, tmp_path):
    """Promise 3."""
    stock = trained_stock_model()
    stock.optimizer.dynamic_scale.assign(ruined)
    ours = ours_from(stock, how, tmp_path)
    expected = 2.0**24 if ruined == math.inf else 2.0**-14
    assert float(ours.optimizer.loss_scale) == expected
    before = ours.get_weights()
    train(ours, range(5, 7))
    assert int(ours.optimizer.skipped_steps) == 0
    assert float(ours.optimizer.loss_scale) in (expected, 2 * expected)
    for one, other in zip(before, ours.get_weights(), strict=True):
        assert np.isfinite(other).all()
        assert (one != other).any()


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_training_killed_at_random_moments_ends_like_one_never_killed(kills, tmp_path):
    """Promise 5, through `BackupAndRestore`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.programs.resume", str(kills), str(tmp_path)],
        cwd=pathlib.Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=60 + 30 * kills,  # many times what it needs, so that a hang ends and a slow machine does not
    )
    assert done.returncode == 0, done.stderr
    never, killed = (np.load(tmp_path / f"{name}.npz") for name in ("never", "killed"))
    assert set(never) == set(killed)
    for name in never:
        np.testing.assert_array_equal(never[name], killed[name])
        assert np.isfinite(never[name]).all()
