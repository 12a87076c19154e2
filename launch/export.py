"""Writes a finished run's student as a folder that PyTorch (diffusers, transformers) loads, with a model card.

python -m launch.export --workdir=DIR [--out=DIR/export] [--adapter]

With --adapter, the student of a config with `lora` leaves as an adapter for `peft` or diffusers, not folded into its base.
"""

from jaxdistill.core.records import local
from launch._command import arguments, main, needed


def export(argv: list[str]) -> None:
    values, config = arguments(argv, {"config": "", "workdir": "", "out": "", "adapter": False})
    config, workdir = needed(values, config)
    from jaxdistill.core import loop, report
    from jaxdistill.interop import export as to_folder

    out = local(values["out"] or workdir / "export", "--out")
    trained = loop.load(workdir, config)
    report.read(workdir)
    to_folder.export(trained, out, adapter=values["adapter"])
    print(f"exported: {out}")


if __name__ == "__main__":
    main(export)
