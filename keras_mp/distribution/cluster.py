"""The cluster that a multi-worker job runs on: read from `TF_CONFIG`, checked, and waited for.

TensorFlow waits without end for a missing worker, in native code that not even Ctrl-C interrupts. So the addresses of
the workers are tried here first.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from keras_mp.errors import DistributionError

__all__ = ["Cluster", "from_environment", "is_slurm_job", "wait_for"]

_JOBS = ("chief", "worker")
_EXAMPLE = '{"cluster": {"worker": ["10.0.0.1:12345", "10.0.0.2:12345"]}, "task": {"type": "worker", "index": 0}}'
_TRY_EVERY_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a job, and the place of this process among them.

    Args:
        jobs: addresses (`host:port`) by job, of `"chief"` and `"worker"`.
        task_type: the job of this process.
        task_index: which of the job's addresses is this process.
    """

    jobs: Mapping[str, tuple[str, ...]]
    task_type: str
    task_index: int

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses of all workers, the chief's first."""
        return tuple(address for job in _JOBS for address in self.jobs.get(job, ()))

    @property
    def own_address(self) -> str:
        """The address of this process."""
        return self.jobs[self.task_type][self.task_index]


def is_slurm_job(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM has started this process as one task of several.

    Args:
        environment: the environment variables.

    Example:
        >>> is_slurm_job({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[1-4]"})
        True
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    return "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment and tasks.isdigit() and int(tasks) > 1


def from_environment(environment: Mapping[str, str] = os.environ) -> Cluster | None:
    """Reads the cluster from the environment variable `TF_CONFIG`.

    Args:
        environment: the environment variables.

    Returns:
        The cluster, or None where the variable is not set or names no workers.

    Raises:
        DistributionError: its content is wrong. The message shows it and an example.

    Example:
        >>> config = '{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 1}}'
        >>> from_environment({"TF_CONFIG": config}).own_address
        'b:1'
    """
    text = environment.get("TF_CONFIG", "").strip()
    if not text:
        return None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(text, f"it is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise _wrong(text, "it is not a JSON object")
    jobs = config.get("cluster")
    if not jobs:
        return None
    if not isinstance(jobs, dict) or not all(_is_addresses(addresses) for addresses in jobs.values()):
        raise _wrong(text, '"cluster" must hold a list of addresses "host:port" for each job')
    unknown = [job for job in jobs if job not in _JOBS]
    if unknown:
        raise _wrong(
            text,
            f'"cluster" has the job {unknown[0]!r}; multi-worker training knows "worker" and one "chief"',
        )
    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") not in jobs or not str(task.get("index", "")).isdigit():
        raise _wrong(text, f'"task" must say which worker this process is: a "type" of {list(jobs)} and an "index"')
    index = int(task["index"])
    if index >= len(jobs[task["type"]]):
        raise _wrong(text, f'"task" has index {index}, and there are {len(jobs[task["type"]])} of job {task["type"]!r}')
    return Cluster({job: tuple(addresses) for job, addresses in jobs.items()}, task["type"], index)


def wait_for(cluster: Cluster, seconds: float) -> None:
    """Waits until every worker's address accepts a connection.

    Meanwhile this process accepts connections at its address, because all workers wait for one another.

    Args:
        cluster: the workers.
        seconds: how long to wait.

    Raises:
        DistributionError: with the addresses that did not respond, or if this process's address is taken.
    """
    missing = {address for address in cluster.addresses if address != cluster.own_address}
    end = time.monotonic() + seconds
    with _answering(cluster.own_address):
        while missing:
            missing = {address for address in missing if not _answers(address)}
            if not missing:
                break
            if time.monotonic() > end:
                raise DistributionError(
                    f"No worker answers at {', '.join(sorted(missing))} after {seconds:g} s; this is "
                    f"{cluster.task_type} {cluster.task_index} at {cluster.own_address}, and the cluster is "
                    f"{dict(cluster.jobs)}. Start every worker of TF_CONFIG, see that its addresses are right and that "
                    'no firewall is between them, or wait longer: keras_mp.strategy("multiworker", timeout=600).'
                )
            time.sleep(_TRY_EVERY_SECONDS)


def _wrong(text: str, what: str) -> DistributionError:
    return DistributionError(
        f"TF_CONFIG is set, and {what}. It is: {text} Set it on each worker to, for example, {_EXAMPLE}, unset it to "
        "train on this machine alone, or start the workers of one machine by `keras-mp launch --workers 2 script.py`."
    )


def _is_addresses(addresses: Any) -> bool:
    return (
        isinstance(addresses, list)
        and bool(addresses)
        and all(isinstance(each, str) and each.rpartition(":")[2].isdigit() and ":" in each for each in addresses)
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _answers(address: str) -> bool:
    try:
        with socket.create_connection(_split(address), timeout=1.0):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _answering(address: str) -> Iterator[None]:
    port = _split(address)[1]
    try:
        listener = socket.create_server(("", port), reuse_port=False)
    except OSError as error:
        raise DistributionError(
            f"This worker is to answer at {address}, and port {port} cannot be had here: {error.strerror}. Another "
            "process may have it, perhaps a worker of an earlier run: end that, or name another port in TF_CONFIG."
        ) from None
    with listener:
        yield
