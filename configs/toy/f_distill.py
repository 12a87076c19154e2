"""f-distill (arXiv:2502.15681) on a mixture of sixteen modes with a small student: Jensen-Shannon
against the reverse KL of DMD2.

    python -m launch.train --config=configs/toy/f_distill.py --workdir=runs/toy_f_distill

2 CPU cores, under 2 minutes, the run with reverse KL (`reverse_kl`, which is DMD2) included. The
claim: the divergence of the shares of modes from the data's, `mode_kl`, is at most that of reverse
KL, from equal steps and settings. `--config.method.divergence=` takes any of
fdivergence.NAMES; `--config.data.seed=N` makes another mixture.

It holds on one of three: measured on seeds 0, 1, 2 (seed and data.seed) .040, .035, .054 against
.034, .041, .046, at energy distances of .0059, .0035, .0045 against .0043, .0035, .0037. The
discriminator sees ratios near 1, so both gradients are nearly the same. Settings were chosen on
seed 10: .042 against .050. With networks of width 12 there .120 against .124 (forward KL .126); on
seed 11 with `match_times` up to 0.5 in both runs .061 against .068 (forward KL .063, the Jeffreys
divergence .071).
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.f_distill import FDistill
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.heads import Discriminator
from jaxdistill.objectives.fdivergence import FDivergence, JensenShannon, ReverseKL

ABLATIONS = {"forward KL": ("method.divergence=forward_kl",)}
WIDTH = 32


def distil(divergence: FDivergence, **rest):
    net = dict(model=MLP(width=WIDTH, depth=2), denoiser=Denoiser(), init="fresh")
    return experiment(
        steps=3000,
        data=Mixture(seed=0, labelled=False, modes=16, std=0.05),
        method=FDistill(
            divergence=divergence, critic_steps=3, gan_weight=1e-3, disc_weight=1.0
        ),
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                **net,
                optimizer=Optimizer(lr=1e-3, b1=0.0, schedule="cosine"),
                ema=Ema(rate=0.99),
            ),
            fake=Role(**net, optimizer=Optimizer(lr=2e-3, b1=0.0)),
            disc=Role(
                model=Discriminator(taps=1, dim=WIDTH),
                optimizer=Optimizer(lr=2e-3, b1=0.0),
            ),
        ),
        evaluation=PointEval(student_steps=(1,), teacher_steps=(50, 1)),
        checkpoint_every=3000,
        **rest,
    )


def get_config():
    return distil(
        JensenShannon(),
        runs=dict(reverse_kl=distil(ReverseKL())),
        claim=dict(
            metric="mode_kl",
            model="student@1",
            baseline="reverse_kl@1",
            better="lower",
            ratio=1.0,
        ),
    )
