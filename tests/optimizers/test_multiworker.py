"""The optimizer's promises on two workers: processes of programs/multiworker_optimizer.py."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.programs import multiworker_optimizer as multiworker_program

WORKERS = 2
# Many times what they need, so that a hang ends and a slow machine does not.
SECONDS = 300


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each worker printed. One launch serves every test here."""
    folder = tmp_path_factory.mktemp("workers")
    addresses = [f"127.0.0.1:{port}" for port in free_ports(WORKERS)]
    repository = pathlib.Path(__file__).parents[2]
    processes, logs = [], []
    try:
        for index in range(WORKERS):
            config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            log = folder / f"worker{index}"
            logs.append(log)
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", "-m", "tests.programs.multiworker_optimizer"],
                        cwd=repository,
                        env={**os.environ, "TF_CONFIG": json.dumps(config)},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        for process in processes:
            process.wait(SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    printed = [log.read_text() for log in logs]
    assert [process.returncode for process in processes] == [0] * WORKERS, "\n".join(printed)
    return [json.loads(text.splitlines()[-1]) for text in printed]


@pytest.fixture(scope="module")
def one_device():
    return multiworker_program.results(tf.distribute.get_strategy())


@pytest.mark.parametrize("case", multiworker_program.CASES)
def test_workers_on_shards_equal_one_device_on_the_whole_batch(case, workers, one_device):
    """Promises 1, 2 and 4, with a bad row first on one worker, then on the other."""
    for worker in workers:
        # What a step skips on one worker it skips on both, when one device would.
        assert worker[case]["counters"] == one_device[case]["counters"]
        for mine, theirs in zip(worker[case]["state"], one_device[case]["state"], strict=True):
            # Shards are added up in another order than rows of one batch, and optimizers divide by square roots.
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-6)
    assert workers[0][case] == workers[1][case]
    assert [skipped for _, skipped, _ in workers[0][case]["counters"]] == [0, 1, 1, 1, 2, 2, 2]
