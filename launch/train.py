"""Trains what a config describes, or resumes it.

python -m launch.train --config=FILE[:variant] --workdir=DIR [--dry_run] [--distributed] \\
    [--restarts=N] [--config.key=value ...]

With --distributed it is one process of several, on a TPU pod, GKE or Slurm, which share the work
folder. Under a launcher that restarts this command after failures, --restarts=N is a bound: after N
restarts without a new checkpoint it is refused.
Exit codes: 0 done, 2 refused, 75 stopped by SIGTERM or Ctrl-C with work left (the same command goes
on), 1 anything else.
"""

from launch._command import arguments, join, main, needed, whole
from launch._restarts import bounded

KNOWN = {
    "config": "",
    "workdir": "",
    "dry_run": False,
    "distributed": False,
    "restarts": "0",
}


def train(argv: list[str]) -> None:
    values, config = arguments(argv, KNOWN)
    config, workdir = needed(values, config)
    restarts = whole(values, "restarts", 0)
    with bounded(workdir, restarts, lambda: join(values["distributed"])):
        import jax

        from jaxdistill.run import loop, report

        result = loop.run(config, workdir, dry_run=values["dry_run"])
        if not values["dry_run"] and jax.process_index() == 0:
            print(report.summary(result, workdir))


if __name__ == "__main__":
    main(train)
