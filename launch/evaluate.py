"""Evaluates a finished run again, also with other settings, and rewrites its report.

python -m launch.evaluate --workdir=DIR [--config=FILE] [--config.evaluation.key=value ...]
"""

from launch._command import arguments, main, needed


def evaluate(argv: list[str]) -> None:
    values, config = arguments(argv, {"config": "", "workdir": ""})
    config, workdir = needed(values, config)
    from jaxdistill.run import loop, report

    result = loop.evaluate(workdir, config)
    print(report.summary(result, workdir))


if __name__ == "__main__":
    main(evaluate)
