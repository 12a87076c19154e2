"""Any config as N processes of this machine, joined as the hosts of a cluster are: gloo collectives
between CPUs.

python -m launch.local_cluster N [--devices=1] [--timeout=60] [--dry_run] -- --config=FILE \\
    --workdir=DIR [--config.key=value ...]

What follows the dashes are the arguments of launch.train. Each process has `devices` simulated
devices. SIGTERM and Ctrl-C reach every process, which save and end with 75, and so does this
command. Where one is lost, the others are ended after `timeout` seconds at most, one line says
which it was, and the exit code is 1: the same command goes on from the last checkpoint. With
--dry_run it only prints what every process would execute.
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
    values, _ = arguments(argv[1:cut], {"devices": "1", "timeout": "60", "dry_run": False})
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
        "XLA_FLAGS": " ".join([*given, f"--xla_force_host_platform_device_count={devices}"]),
    }
    each = [{**common, "JAXDISTILL_PROCESS": str(i)} for i in range(count)]
    if values["dry_run"]:
        for env in each:
            print(" ".join(f"{k}={shlex.quote(v)}" for k, v in env.items()), shlex.join(command))
        return
    sys.exit(
        watch(
            [
                subprocess.Popen(command, env=os.environ | env, start_new_session=True)
                for env in each
            ],
            timeout,
        )
    )


def watch(processes: list[subprocess.Popen], timeout: float) -> int:
    """Waits for all; the exit code is 0 where all ended so, 2 where one refused its input, 75 where
    they stopped with work left, else 1.
    """
    forward = lambda number, frame: [
        p.send_signal(signal.SIGTERM) for p in processes if p.poll() is None
    ]
    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    lost = []
    try:
        while not lost and any(p.poll() is None for p in processes):
            time.sleep(0.1)
            lost = [i for i, p in enumerate(processes) if p.poll() not in (None, 0, STOPPED)]
        _end([p for p in processes if p.poll() is None], timeout)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [p.wait() for p in processes]
    for i in lost:
        how = (
            f"killed by {signal.Signals(-codes[i]).name}"
            if codes[i] < 0
            else f"exit code {codes[i]}"
        )
        if codes[i] != 2:
            print(
                f"local_cluster: process {i} of {len(processes)} was lost ({how}); the others"
                " were ended; "
                "run the same command again to go on from the last checkpoint",
                file=sys.stderr,
            )
    if 2 in codes:
        return 2
    return 1 if any(code not in (0, STOPPED) for code in codes) else max(codes)


def _end(processes: list[subprocess.Popen], timeout: float) -> None:
    """SIGTERM, and SIGKILL for what still waits for the lost process after `timeout` seconds."""
    until = time.time() + timeout
    for p in processes:
        p.terminate()
    for p in processes:
        try:
            p.wait(max(until - time.time(), 0.1))
        except subprocess.TimeoutExpired:
            p.kill()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    main(cluster)
