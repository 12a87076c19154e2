"""A tiny experiment that trains in seconds: DMD2 on a mixture, three MLPs."""

import sys
from pathlib import Path

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.diffusion.denoiser import Denoiser


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
            model=spec(
                "models.language.lm:LM", vocab=16, dim=16, mlp=32, heads=2, depth=1, max_length=16
            )
        )
        return experiment(
            **common,
            data=spec("data.language:Markov", vocab=16, length=12, batch_size=16),
            method=spec("methods.language.gkd:GKD", on_policy=0.5, prompt_length=4),
            roles=dict(
                teacher=Role(init="exact"), student=Role(**sizes, optimizer=Optimizer(lr=1e-3))
            ),
        )
    net = dict(
        model=spec("models.denoisers.mlp:MLP", width=16, depth=1),
        denoiser=Denoiser(),
        init="fresh",
        optimizer=Optimizer(lr=1e-3),
    )
    counted = variant == "counted"
    judged = dict(
        evaluation=spec("evals.points:PointEval", samples=200, batch=200, teacher_steps=(2, 1)),
        claim=dict(
            metric="energy", model="student@1", baseline="teacher@1", better="lower", ratio=100.0
        ),
    )
    return experiment(
        **common,
        data=spec("tests.run.counting:Numbered", batch_size=16)
        if counted
        else spec("data.mixtures:Mixture", batch_size=16),
        method=spec(
            "tests.run.counting:Counted" if counted else "methods.distribution.dmd2:DMD2",
            critic_steps=2,
            taps=(0,),
        ),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(**net, ema=Ema(rate=0.9)),
            fake=Role(**net),
            disc=Role(model=spec("models.heads:Discriminator", dim=16, width=8)),
        ),
        **({} if variant in ("bare", "counted") else judged),
    )


def spec_mesh():
    from jaxdistill.core.sharding import MeshShape

    return MeshShape(data=1, fsdp=1, tensor=1)


if __name__ == "__main__":  # a run in a process of its own, to be killed: tiny.py WORKDIR STEPS
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from jaxdistill.run import loop
    from launch._command import main

    def command(argv):
        config = get_config()
        config.steps = int(argv[1])
        loop.run(config, argv[0], progress=False)

    main(command)
