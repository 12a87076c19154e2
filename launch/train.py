"""Trains what a config describes, or goes on where it stopped.

python -m launch.train --config=FILE[:variant] --workdir=DIR [--dry_run] [--config.key=value ...]
"""

from launch._command import arguments, main, needed


def train(argv: list[str]) -> None:
    values, config = arguments(argv, {"config": "", "workdir": "", "dry_run": False})
    config, workdir = needed(values, config)
    from jaxdistill.core import loop, report

    result = loop.run(config, workdir, dry_run=values["dry_run"])
    if values["dry_run"]:
        return
    if result["models"]:
        print(report.text_table(result["models"]))
    if result["claim"]:
        stated = result["claim"]
        sign = "<=" if stated["better"] == "lower" else ">="
        print(f"claim: {stated['metric']} of {stated['model']} {sign} {stated['bound']} x {stated['against']}: "
              f"{report.number(stated['value'])} against {report.number(stated['baseline'])}: "
              f"{'holds' if stated['holds'] else 'does not hold'}")  # fmt: skip
    print(f"report: {workdir / 'report.html'}")


if __name__ == "__main__":
    main(train)
