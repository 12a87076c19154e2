"""Exports a finished run's student as a folder for diffusers or transformers, with a model card.

python -m launch.export --workdir=DIR [--out=DIR/export] [--adapter]

An earlier export in the folder is replaced; other existing folders are refused. With --adapter, a
student with `lora` is exported as an adapter for `peft` or diffusers, not merged into its base.
"""

from jaxdistill.run.records import local
from launch._command import arguments, main, needed


def export(argv: list[str]) -> None:
    values, config = arguments(
        argv, {"config": "", "workdir": "", "out": "", "adapter": False}
    )
    config, workdir = needed(values, config)
    from jaxdistill.run import export as to_folder
    from jaxdistill.run import loop, report
    from jaxdistill.run.experiment import Experiment

    out = local(values["out"] or workdir / "export", "--out").expanduser()
    experiment = Experiment(config, workdir)
    adapter = values["adapter"]
    to_folder.check(experiment, out, adapter=adapter)
    report.read(workdir)
    roles = to_folder.needed_roles(experiment, adapter=adapter)
    trained = loop.load(workdir, config, roles=roles)
    to_folder.export(trained, out, adapter=adapter)
    print(f"exported: {out}")


if __name__ == "__main__":
    main(export)
