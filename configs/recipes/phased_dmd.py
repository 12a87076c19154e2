"""Phased DMD (arXiv:2510.27684) of Wan 2.2 T2V A14B, whose teacher is two experts, into four steps
in two phases.

    python -m launch.train --config=configs/recipes/phased_dmd.py --workdir=DIR \\
        --config.data.path=PROMPTS \\
        --config.roles.teacher0.init=PIPELINE/transformer
        --config.roles.teacher.init=PIPELINE/transformer_2

Variants: `:wan21` is Wan 2.1 T2V 14B (one teacher: `--config.roles.teacher.init`), `:released` the
released trainer's interleaved phases with full weights, shift 7, two fake scores in the second
phase, plain mean square. PIPELINE is a diffusers folder of Wan 2.2 (`interop.families.wan.experts`
reads its boundary, .875). PROMPTS is a folder of
*.arrayrecord with cond = {text: UMT5's states [512, 4096], mask: [512]}, null_cond the same of the
negative prompt, and x [21, 60, 104, 16], of which only the shape is read (480 x 832, 81 frames).

The paper: batch 64, fake scores at 4e-7 with full weights, generators at 5e-5 as adapters of rank
64 and alpha 8, no momentum, five updates of the fakes to one, guidance 4 of the real score. It does
not say how long; its figures show 100 to 400 generator updates for the second phase. Optical flow
9.30 and dynamic degree 82.27 % against 10.26 and 79.55 % at 40 steps.
Departures: decay 0.01 and gradient norm 1 are the released trainer's.
"""

from jaxdistill.core.build import Lora, Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods.distribution.phased_dmd import (
    InterleavedPhasedDMD,
    PhasedDMD,
)
from jaxdistill.models.denoisers.wan import Wan
from jaxdistill.samplers.phases import teacher_roles

WAN14B = dict(
    channels=16,
    dim=5120,
    mlp=13824,
    heads=40,
    depth=40,
    text_dim=4096,
    dtype="bfloat16",
    remat="full",
)
CONDITION = {"text": "normal 512 4096", "mask": "constant 1 512"}
RECORD = {
    "x": "normal 21 60 104 16",
    **{f"{c}/{k}": v for c in ("cond", "null_cond") for k, v in CONDITION.items()},
}

PAPER = dict(process=Flow(shift=5.0), guidance=4.0)
METHODS = {
    "": PhasedDMD(
        teacher_bounds=(0.875 / 1.5,), **PAPER
    ),  # .875 after a shift of 5
    "wan21": PhasedDMD(**PAPER),
    "released": InterleavedPhasedDMD(
        process=Flow(shift=7.0),
        teacher_bounds=(0.5,),
        guidance=4.0,
        fake_clamp=float("inf"),
    ),
}


def get_config(variant=""):
    method = lookup(METHODS, variant, "variant")
    wan = Role(
        model=Wan(**WAN14B),
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
        param_dtype="bfloat16",
    )
    optimizer = lambda lr: Optimizer(lr=lr, b1=0.0, weight_decay=0.01, clip=1.0)
    adapter = lambda role: Role(
        lora=Lora(rank=64, alpha=8.0, base=method.inits[role]),
        optimizer=optimizer(5e-5),
    )
    expert = (
        (lambda role: Role(optimizer=optimizer(2e-6)))
        if variant == "released"
        else adapter
    )
    # of generators, over both phases
    updates = 4000 if variant == "released" else 800
    return experiment(
        steps=updates * method.critic_steps,
        data=ArrayRecords(batch_size=64),
        method=METHODS[variant],
        roles={
            **dict.fromkeys(teacher_roles(method.teacher_bounds), wan),
            **{
                role: expert(role)
                if role in method.exports
                else Role(optimizer=optimizer(4e-7))
                for role in method.inits
            },
        },
        checkpoint_every=100,
    )
