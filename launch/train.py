"""Trains what a config describes, or goes on where it stopped.

python -m launch.train --config=FILE[:variant] --workdir=DIR [--dry_run] [--distributed] [--config.key=value ...]

With --distributed it is one process of several, on a TPU pod, GKE or Slurm; the work folder is then shared between them.
"""

from launch._command import arguments, join, main, needed


def train(argv: list[str]) -> None:
    values, config = arguments(argv, {"config": "", "workdir": "", "dry_run": False, "distributed": False})
    config, workdir = needed(values, config)
    join(values["distributed"])
    import jax

    from jaxdistill.core import loop, report

    result = loop.run(config, workdir, dry_run=values["dry_run"])
    if not values["dry_run"] and jax.process_index() == 0:
        print(report.summary(result, workdir))


if __name__ == "__main__":
    main(train)
