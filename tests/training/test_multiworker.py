"""`keras_mp.Model` on several workers: processes of `tests/programs/multiworker_fit.py` that talk over the loopback."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mp.distribution import workers
from keras_mp.distribution.launch import launch
from tests.optimizers.test_multiworker import free_ports
from tests.programs import multiworker_fit as multiworker_fit_program

REPOSITORY = pathlib.Path(__file__).parents[2]
PROGRAM = [sys.executable, "-W", "ignore", "-m", "tests.programs.multiworker_fit"]
# Many times what they need, so that a hang ends and a slow machine does not.
SECONDS = 300


def start(count, folder, *arguments, program=PROGRAM):
    """Starts the workers, as machines of their own would: none ends another. Returns processes and logs."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
    processes, logs = [], []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        logs.append(folder / f"log{index}")
        with logs[-1].open("w") as output:
            environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
            command = [*program, *map(str, arguments)]
            processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    return processes, logs


def finish(processes, logs):
    """Waits for the workers; returns exit codes and what they printed."""
    try:
        end = time.monotonic() + SECONDS
        for process in processes:
            process.wait(max(1, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [process.returncode for process in processes], [log.read_text() for log in logs]


def run(count, folder, *arguments, program=PROGRAM):
    codes, printed = finish(*start(count, folder, *arguments, program=program))
    assert codes == [0] * count, "\n".join(printed)
    return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.fixture(scope="module")
def one_device():
    return multiworker_fit_program.results(tf.distribute.get_strategy())


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_workers_train_evaluate_and_predict_as_one_device(count, one_device, tmp_path):
    found = run(count, tmp_path)
    for mine in found:
        for case, expected in one_device.items():
            if case == "unbuilt":
                assert mine[case] == list(expected)
                continue
            if case == "weighted":
                np.testing.assert_allclose(mine[case], expected, rtol=1e-4, atol=1e-5)
                continue
            # Shards are added up in another order than rows of one batch.
            for name in ("evaluate", "predict"):
                np.testing.assert_allclose(mine[case][name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
            for one, other in zip(mine[case]["weights"], expected["weights"], strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
            assert set(mine[case]["history"]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
            for name, values in mine[case]["history"].items():
                np.testing.assert_allclose(values, expected["history"][name], rtol=1e-4, err_msg=name)
            # The row that is not finite is one worker's, and all of them skip the step.
            assert (mine[case]["skipped"], mine[case]["scale"]) == (1, 512.0)
    assert all(mine == found[0] for mine in found)


def test_a_job_that_lost_a_worker_says_so_and_goes_on_bit_by_bit_where_it_was(tmp_path):
    folders = {}
    for name in ("whole", "interrupted"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
    whole = run(2, folders["whole"], "--folder", folders["whole"])

    processes, logs = start(2, folders["interrupted"], "--folder", folders["interrupted"], "--dying-worker", 1)
    processes[1].wait(SECONDS)
    died = time.monotonic()
    codes, printed = finish(processes, logs)
    assert time.monotonic() - died < 60, printed[0]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1, printed[0]
    assert "keras_mp.errors.WorkerLostError: This is worker 0 of" in printed[0]
    assert "another worker does not answer any more" in printed[0]

    again = run(2, folders["interrupted"], "--folder", folders["interrupted"])
    assert [mine["state"] for mine in again] == [mine["state"] for mine in whole]
    # The first worker writes, the others do not.
    assert [mine["files"] for mine in again] == [["backup", "log.csv", "model.keras"], []]
    # The interrupted job had made two epochs; the other one of the four it made again from the backup.
    rows = (folders["interrupted"] / "worker0" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if row[0].isdigit()] == ["0", "1", "2", "3"]


@pytest.mark.stock_defect
def test_stock_keras_fits_on_two_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import keras, numpy as np, tensorflow as tf\n"
        "strategy = tf.distribute.MultiWorkerMirroredStrategy()\n"
        "with strategy.scope():\n"
        "    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])\n"
        "    model.compile('sgd', 'mse')\n"
        "model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)\n"
    )
    with (tmp_path / "log").open("wb") as log:
        code = launch([sys.executable, "-W", "ignore", str(script)], 2, output=log, grace_seconds=1.0)
    assert code == 0, (tmp_path / "log").read_text()


def test_one_process_is_the_chief_and_keeps_its_callbacks(mirrored):
    for strategy in (tf.distribute.get_strategy(), mirrored(2)):
        assert workers.is_chief(strategy)
        assert not workers.is_one_of_several(strategy)
        assert workers.explain_loss(tf.errors.UnavailableError(None, None, "Socket closed"), strategy) is None


def test_keras_tells_where_a_backup_ends(tmp_path):
    """Rests on `Model._initial_epoch`, which `BackupAndRestore` sets and all workers have to agree on."""
    for _ in range(2):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        callback = keras.callbacks.BackupAndRestore(str(tmp_path), delete_checkpoint=False)
        model.fit(np.ones((4, 4)), np.ones((4, 1)), epochs=2, verbose=0, callbacks=[callback])
    assert model._initial_epoch == 2


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What two workers print that are unlike each other in several ways, one after another."""
    folder = tmp_path_factory.mktemp("unlike")
    return run(2, folder, program=[*PROGRAM[:-1], "tests.programs.multiworker_unlike"])


def test_workers_take_the_chiefs_policy_and_tell_of_different_ones(told):
    chief, other = (each["policy"] for each in told)
    assert (chief["recommended"], other["recommended"]) == ("mixed_bfloat16", "float32")
    assert chief["chosen"] == other["chosen"] == "mixed_bfloat16"
    assert chief["said"] == other["said"]
    assert "'dense' (Dense): worker 0 has mixed_bfloat16; worker 1 has mixed_float16" in chief["said"]


UNLIKE = {
    # Names that Keras numbers say nothing of a policy.
    "names": [],
    "order": ["'dense' (Dense): worker 0 has float32; worker 1 has mixed_bfloat16"],
    "later": ["'dense' (Dense): worker 0 has float32; worker 1 has mixed_bfloat16"],
    "scaling": ["loss scaling", "worker 0 has none", "worker 1 has LossScaleOptimizer, reduce_dtype='float32'"],
    "reduction": ["worker 0 has LossScaleOptimizer, reduce_dtype='float32'", "reduce_dtype='bfloat16'"],
}


@pytest.mark.parametrize("case", UNLIKE)
def test_workers_tell_what_is_unlike(case, told):
    one, other = (each[case] for each in told)
    assert one == other
    assert bool(one) == bool(UNLIKE[case])
    for words in UNLIKE[case]:
        assert words in one
