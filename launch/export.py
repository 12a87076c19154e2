"""Exports a finished run's student as a folder for diffusers or transformers, with a model card.

python -m launch.export --workdir=DIR [--out=DIR/export] [--adapter] \\
    [--adapters=FOLDER:WEIGHT,...]

An earlier export in the folder is replaced; other existing folders are refused. With --adapter, a
student with `lora` is exported as an adapter for `peft` or diffusers, not merged into its base.
With --adapters, it is merged with a weighted sum of adapters on its base: its own, and those of the
students of other runs on the same base. A weight that is left out is 1; the folder "." is the run
itself.
"""

from jaxdistill.core.types import Refused
from jaxdistill.run.records import local
from launch._command import arguments, main, needed, shares

KNOWN = {"config": "", "workdir": "", "out": "", "adapter": False, "adapters": ""}


def export(argv: list[str]) -> None:
    values, config = arguments(argv, KNOWN)
    config, workdir = needed(values, config)
    weights = shares(values, "adapters", workdir)
    from jaxdistill.run import adapters, loop, report
    from jaxdistill.run import export as to_folder
    from jaxdistill.run.experiment import Experiment

    out = local(values["out"] or workdir / "export", "--out").expanduser()
    experiment = Experiment(config, workdir)
    adapter = values["adapter"]
    if adapter and weights:
        raise Refused("--adapters: goes with merged weights, expected no --adapter")
    to_folder.check(experiment, out, adapter=adapter)
    report.read(workdir)
    exports = set(experiment.method.exports)
    if weights:
        adapters.check(experiment, exports, weights)
    roles = to_folder.needed_roles(experiment, adapter=adapter)
    trained = loop.load(workdir, config, roles=roles)
    if weights:
        trained = adapters.summed(trained, exports, weights)
    to_folder.export(trained, out, adapter=adapter)
    print(f"exported: {out}")


if __name__ == "__main__":
    main(export)
