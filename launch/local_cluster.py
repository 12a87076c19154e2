"""Trains a config with N processes on the CPUs of this machine, joined like hosts of a cluster.

python -m launch.local_cluster N [--devices=1] [--timeout=60] [--dry_run] -- --config=FILE \\
    --workdir=DIR [--config.key=value ...]

The arguments after "--" are those of launch.train. Each process has --devices simulated devices;
collectives are gloo's. SIGTERM and Ctrl-C are passed to all processes, which save and exit with 75,
and so does this command. Where a process is lost, the others are ended after at most --timeout
seconds, one line says which it was, and the exit code is 1: the same command goes on from the last
checkpoint. With --dry_run the commands of the processes are only printed.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time

from jaxdistill.core.types import Refused
from launch._command import STOPPED, arguments, main, whole


def cluster(argv: list[str]) -> None:
    if not argv or not argv[0].isdigit() or int(argv[0]) < 1:
        raise Refused(
            "local_cluster: expected the number of processes first, as in: local_cluster 2 --"
            " --config=FILE --workdir=DIR"
        )
    cut = argv.index("--") if "--" in argv else len(argv)
    values, _ = arguments(
        argv[1:cut], {"devices": "1", "timeout": "60", "dry_run": False}
    )
    count = int(argv[0])
    devices = whole(values, "devices", 1)
    timeout = whole(values, "timeout", 1)
    command = [sys.executable, "-m", "launch.train", *argv[cut + 1 :]]
    given = os.environ.get("XLA_FLAGS", "").split()
    common = {
        "JAX_PLATFORMS": "cpu",
        "JAXDISTILL_COORDINATOR": f"127.0.0.1:{_free_port()}",
        "JAXDISTILL_PROCESSES": str(count),
        "JAXDISTILL_HEARTBEAT": str(timeout),
        "XLA_FLAGS": " ".join(
            [*given, f"--xla_force_host_platform_device_count={devices}"]
        ),
    }
    each = [{**common, "JAXDISTILL_PROCESS": str(i)} for i in range(count)]
    if values["dry_run"]:
        for env in each:
            print(
                " ".join(f"{k}={shlex.quote(v)}" for k, v in env.items()),
                shlex.join(command),
            )
        return
    processes = []
    for env in each:
        child = subprocess.Popen(
            command, env=os.environ | env, start_new_session=True
        )
        processes.append(child)
    sys.exit(watch(processes, timeout))


def watch(processes: list[subprocess.Popen], timeout: float) -> int:
    """Waits for all processes.

    Args:
        processes: The processes.
        timeout: Seconds that the others have to end after one is lost.

    Returns:
        The exit code: 0 where it is that of all, 2 where one refused its input, 75 where they
        stopped with work left, else 1.
    """

    def running() -> list[subprocess.Popen]:
        return [p for p in processes if p.poll() is None]

    def forward(number: int, frame: object) -> None:
        for p in running():
            p.send_signal(signal.SIGTERM)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    lost = []
    try:
        while not lost and running():
            time.sleep(0.1)
            lost = [
                i
                for i, p in enumerate(processes)
                if p.poll() not in (None, 0, STOPPED)
            ]
        _end(running(), timeout)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [p.wait() for p in processes]
    for i in lost:
        code = codes[i]
        if code == 2:
            continue
        how = (
            f"killed by {signal.Signals(-code).name}"
            if code < 0
            else f"exit code {code}"
        )
        print(
            f"local_cluster: process {i} of {len(processes)} was lost ({how}); the others were"
            " ended; run the same command again to go on from the last checkpoint",
            file=sys.stderr,
        )
    if 2 in codes:
        return 2
    return 1 if any(code not in (0, STOPPED) for code in codes) else max(codes)


def _end(processes: list[subprocess.Popen], timeout: float) -> None:
    """Sends SIGTERM, and SIGKILL to processes that still run after `timeout` seconds."""
    until = time.time() + timeout
    for p in processes:
        p.terminate()
    for p in processes:
        try:
            p.wait(max(until - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            p.kill()


def _free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main(cluster)
