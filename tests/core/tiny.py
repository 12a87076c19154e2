"""A tiny experiment that trains in seconds: DMD2 on a mixture, three MLPs."""

import sys
from pathlib import Path

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser


def get_config(variant=""):
    net = dict(model=spec("models.mlp:MLP", width=16, depth=1), denoiser=Denoiser(), init="fresh", optimizer=Optimizer(lr=1e-3))
    return experiment(
        steps=30,
        log_every=5,
        checkpoint_every=5,
        keep=3,
        tensorboard=variant == "tensorboard",
        data=spec("data.mixtures:Mixture", batch_size=16),
        method=spec("methods.distribution.dmd2:DMD2", critic_steps=2, taps=(0,)),
        mesh=spec_mesh(),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(**net, ema=Ema(rate=0.9)),
            fake=Role(**net),
            disc=Role(model=spec("models.heads:Discriminator", dim=16, width=8)),
        ),
        evaluation=spec("evals.points:PointEval", samples=200, batch=200, teacher_steps=(2, 1)),
        claim=dict(metric="energy", model="student@1", baseline="teacher@1", better="lower", ratio=100.0),
    )


def spec_mesh():
    from jaxdistill.core.sharding import MeshShape

    return MeshShape(data=1, fsdp=1, tensor=1)


if __name__ == "__main__":  # a run in a process of its own, to be killed: tiny.py WORKDIR STEPS
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from jaxdistill.core import loop
    from launch._command import main

    def command(argv):
        config = get_config()
        config.steps = int(argv[1])
        loop.run(config, argv[0], progress=False)

    main(command)
