"""`keras_mp.strategy`: what it makes of what is here, and what it says where it cannot."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tensorflow as tf

import keras_mp
from keras_mp import hardware
from keras_mp.distribution import cluster, replicas, strategies
from keras_mp.errors import ArgumentError, DistributionError
from keras_mp.hardware import detection

TWO_WORKERS = {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}
CLUSTER_VARIABLES = ("TF_CONFIG", "TPU_NAME", "COLAB_TPU_ADDR", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in CLUSTER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    hardware.remember(tf.distribute.get_strategy())


def test_default_is_tensorflows_own():
    assert keras_mp.strategy("default") is tf.distribute.get_strategy()


@pytest.mark.skipif(len(tf.config.list_physical_devices()) > 1, reason="for a machine with a CPU alone")
def test_auto_is_default_on_a_cpu():
    assert keras_mp.strategy() is tf.distribute.get_strategy()


@pytest.mark.parametrize("kind", ["auto", "mirrored"])
def test_devices_make_a_mirrored_strategy(kind):
    strategy = keras_mp.strategy(kind, devices=["CPU:2", "/device:cpu:3"])
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert [device.rpartition("/")[2] for device in strategy.extended.worker_devices] == [
        "device:CPU:2",
        "device:CPU:3",
    ]


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"TF_CONFIG": json.dumps(TWO_WORKERS)}, "multiworker"),
        (
            {
                "TF_CONFIG": json.dumps(
                    {**TWO_WORKERS, "cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}
                )
            },
            "default",
        ),
        ({"TF_CONFIG": "{}"}, "default"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, "multiworker"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}, "default"),
        ({"TPU_NAME": "mine"}, "tpu"),
        ({}, "default"),
    ],
)
def test_auto_goes_by_what_is_here(environment, kind, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert strategies._kind_for_what_is_here(None, None) == kind


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (["mirorred"], {}, ArgumentError, "'mirorred'.: expected one of 'auto', 'default', 'mirrored', 'multiworker'"),
        (["mirrored"], {"communication": "mpi"}, ArgumentError, "communication='mpi'.: expected one of 'auto', 'nccl'"),
        (["tpu"], {"devices": ["CPU:0"]}, ArgumentError, "takes no `devices`: they are for \"mirrored\""),
        (["mirrored"], {"tpu": "mine"}, ArgumentError, "takes no `tpu`: it is for \"tpu\""),
        (["mirrored"], {"devices": "CPU:0"}, ArgumentError, "expected a list, such as"),
        (["mirrored"], {"devices": []}, ArgumentError, "expected a list, such as"),
        (["mirrored"], {"devices": ["CPU:0", "CPU:9"]}, DistributionError, "'CPU:9' is not here. TensorFlow has CPU:0"),
        (["mirrored"], {"devices": ["CPU:0", "cpu:0"]}, DistributionError, "a device is named twice"),
        (["multiworker"], {}, DistributionError, "neither TF_CONFIG nor SLURM says which workers there are"),
        (["tpu"], {}, DistributionError, 'TensorFlow sees no TPU here .CPU only.* pip install "keras-mp.tpu."'),
    ],
)  # fmt: skip
def test_what_is_not_here_is_said_in_words(arguments, options, error, words):
    with pytest.raises(error, match=words):
        keras_mp.strategy(*arguments, **options)


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="for a machine without a GPU")
def test_mirrored_without_gpus_says_how_to_name_devices():
    with pytest.raises(DistributionError, match=r'sees no GPU here. Name the devices, for example devices=\["CPU:0"'):
        keras_mp.strategy("mirrored")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{nonsense", "it is not JSON .Expecting property name"),
        ("[1]", "it is not a JSON object"),
        ({"cluster": {"worker": "a:1"}}, '"cluster" must hold a list of addresses "host:port" for each job'),
        ({"cluster": {"worker": ["a"]}}, '"cluster" must hold a list of addresses "host:port" for each job'),
        ({"cluster": {"worker": ["a:1"], "ps": ["b:1"]}}, "has the job 'ps'; multi-worker training knows \"worker\""),
        ({"cluster": {"worker": ["a:1"]}}, '"task" must say which worker this process is'),
        ({**TWO_WORKERS, "task": {"type": "chief", "index": 0}}, '"task" must say which worker .* of .\'worker\'.'),
        ({**TWO_WORKERS, "task": {"type": "worker", "index": 2}}, "has index 2, and there are 2 of job 'worker'"),
    ],
)  # fmt: skip
def test_a_tf_config_that_says_nothing_useful_is_explained(config, words, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(DistributionError, match=f"TF_CONFIG is set, and .*{words}.*keras-mp launch"):
        keras_mp.strategy("multiworker")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def two_workers(own, other):
    return cluster.Cluster({"worker": (f"127.0.0.1:{own}", f"127.0.0.1:{other}")}, "worker", 0)


def test_a_worker_that_never_comes_is_named():
    own, other = free_port(), free_port()
    with pytest.raises(
        DistributionError, match=f"No worker answers at 127.0.0.1:{other} after 0.5 s; this is worker 0"
    ):
        cluster.wait_for(two_workers(own, other), 0.5)


def test_a_worker_that_answers_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as other:
        cluster.wait_for(two_workers(free_port(), other.getsockname()[1]), 30)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as own:
        port = own.getsockname()[1]
        with pytest.raises(DistributionError, match=f"port {port} cannot be had here: Address already in use"):
            cluster.wait_for(two_workers(port, free_port()), 0.5)


def test_an_unreachable_worker_ends_the_program_in_words():
    """TensorFlow itself waits for ever here, where no signal but SIGKILL reaches it."""
    config = {**TWO_WORKERS, "cluster": {"worker": [f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"]}}
    code = "import keras_mp; keras_mp.strategy(timeout=1)"
    environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 1
    assert "keras_mp.errors.DistributionError: No worker answers at 127.0.0.1" in run.stderr


def test_several_workers_are_refused_once_tensorflow_runs(monkeypatch):
    tf.constant(1.0) + 1.0
    monkeypatch.setenv("TF_CONFIG", json.dumps(TWO_WORKERS))
    with pytest.raises(DistributionError, match="was called after TensorFlow had computed something"):
        keras_mp.strategy("multiworker")


def test_the_automatic_policy_is_that_of_the_strategys_devices(monkeypatch):
    devices = [hardware.Device("cpu", "C"), hardware.Device("gpu", "V100", compute_capability=(7, 0))]
    monkeypatch.setattr(detection, "devices_here", lambda: devices)
    assert keras_mp.set_policy("auto").name == "mixed_float16"
    strategy = keras_mp.strategy("mirrored", devices=["CPU:0", "CPU:1"])
    assert keras_mp.set_policy("auto").name == "float32"
    keras_mp.strategy("default")
    assert keras_mp.set_policy("auto").name == "mixed_float16"
    with strategy.scope():
        assert keras_mp.set_policy("auto").name == "float32"


def test_sums_of_several_dtypes_are_taken_at_once(mirrored):
    """Workers pack what is added up into one tensor, which has one dtype."""
    strategy = mirrored(2)

    def on_replica():
        one = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group + 1, tf.int64)
        values = [one, None, tf.cast(one, tf.float32) / 2, one * 10]
        return [value for value in replicas.sum_over_replicas(values) if value is not None]

    sums = tf.function(lambda: strategy.run(on_replica))()
    assert [strategy.experimental_local_results(value)[1].numpy() for value in sums] == [3, 1.5, 30]


def test_strategies_made_one_after_the_other_do_not_disturb_each_other():
    """A cell of a notebook that is run again, with other devices: TensorFlow's own fail here, or wait for ever."""
    made = [keras_mp.strategy("mirrored", devices=[f"CPU:{index}" for index in range(count)]) for count in (2, 3, 2)]

    def total(strategy):
        def on_replica():
            with tf.xla.experimental.jit_scope():
                return replicas.sum_over_replicas([tf.ones([3])])[0]

        return strategy.experimental_local_results(tf.function(lambda: strategy.run(on_replica))())[0].numpy().tolist()

    for _ in range(2):
        assert [total(strategy) for strategy in made] == [[2.0] * 3, [3.0] * 3, [2.0] * 3]
