"""Trains what a config describes, or goes on where it stopped.

python -m launch.train --config=FILE[:variant] --workdir=DIR [--dry_run] [--config.key=value ...]
"""

from launch._command import arguments, main, needed


def train(argv: list[str]) -> None:
    values, config = arguments(argv, {"config": "", "workdir": "", "dry_run": False})
    config, workdir = needed(values, config)
    from jaxdistill.core import loop, report

    result = loop.run(config, workdir, dry_run=values["dry_run"])
    if not values["dry_run"]:
        print(report.summary(result, workdir))


if __name__ == "__main__":
    main(train)
