"""A tiny experiment that trains in seconds: DMD2 on a mixture, three MLPs."""

import sys
from pathlib import Path

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.language import Markov
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.models.language.lm import LM
from tests.run.counting import Counted, Numbered


def get_config(variant=""):
    """ "tensorboard" writes it; "bare" evaluates nothing; "language" is a bare GKD on a synthetic
    language;
    "counted" is a bare run that says which samples it saw.
    """
    common = dict(
        steps=30,
        log_every=5,
        checkpoint_every=5,
        keep=3,
        tensorboard=variant == "tensorboard",
        mesh=spec_mesh(),
    )
    if variant == "language":
        sizes = dict(
            model=LM(vocab=16, dim=16, mlp=32, heads=2, depth=1, max_length=16)
        )
        return experiment(
            **common,
            data=Markov(vocab=16, length=12, batch_size=16),
            method=GKD(on_policy=0.5, prompt_length=4),
            roles=dict(
                teacher=Role(init="exact"),
                student=Role(**sizes, optimizer=Optimizer(lr=1e-3)),
            ),
        )
    net = dict(
        model=MLP(width=16, depth=1),
        denoiser=Denoiser(),
        init="fresh",
        optimizer=Optimizer(lr=1e-3),
    )
    counted = variant == "counted"
    judged = dict(
        evaluation=PointEval(samples=200, batch=200, teacher_steps=(2, 1)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=100.0,
        ),
    )
    return experiment(
        **common,
        data=Numbered(batch_size=16) if counted else Mixture(batch_size=16),
        method=(Counted if counted else DMD2)(critic_steps=2, taps=(0,)),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(**net, ema=Ema(rate=0.9)),
            fake=Role(**net),
            disc=Role(model=Discriminator(dim=16, width=8)),
        ),
        **({} if variant in ("bare", "counted") else judged),
    )


def spec_mesh():
    from jaxdistill.core.sharding import MeshShape

    return MeshShape(data=1, fsdp=1, tensor=1)


if (
    __name__ == "__main__"
):  # a run in a process of its own, to be killed: tiny.py WORKDIR STEPS
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from jaxdistill.run import loop
    from launch._command import main

    def command(argv):
        config = get_config()
        config.steps = int(argv[1])
        loop.run(config, argv[0], progress=False)

    main(command)
