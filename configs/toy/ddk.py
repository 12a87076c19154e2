"""DDK (arXiv:2407.16154) on five synthetic languages of differing entropy: data where the student
lags behind most.

    python -m launch.train --config=configs/toy/ddk.py --workdir=runs/toy_ddk

2 CPU cores, about three minutes. The student has seen mostly the first two languages (`start`), its
teacher all five.
The claim: after the same steps its largest ratio of held-out perplexities to the teacher's over the
domains is lower than with uniform data and the same loss (`baseline`: smoothing 0). Both measure
and train on equally many rows.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.domains import Chains
from jaxdistill.evals.domains import DomainEval
from jaxdistill.methods.language.ddk import DDK
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM

INTERVAL = 24
REFRESHES = 20
MEASURES = 4
DATA = dict(vocab=12, length=32, branches=(2, 2, 2, 3, 4), batch_size=40)
EVAL = DomainEval(samples=2000)
OPTIMIZER = Optimizer(lr=2e-3, schedule="cosine", warmup=20)


def train(steps: int, weights: tuple[float, ...] = (), **sizes):
    """Ordinary training of one network on the domains."""
    return experiment(
        steps=steps,
        data=Chains(weights=weights, **DATA),
        method=SFT(),
        roles=dict(
            student=Role(
                model=LM(vocab=12, heads=4, max_length=32, **sizes),
                optimizer=OPTIMIZER,
            )
        ),
        evaluation=EVAL,
    )


def distil(smoothing: float, runs=None, **rest):
    return experiment(
        steps=(INTERVAL + MEASURES) * REFRESHES,
        log_every=MEASURES,
        runs=dict(
            teacher=train(1200, dim=96, mlp=192, depth=3),
            start=train(
                300, (0.42, 0.42, 0.06, 0.05, 0.05), dim=32, mlp=64, depth=2
            ),
            **(runs or {}),
        ),
        data=Chains(interval=INTERVAL, measures=MEASURES, **DATA),
        method=DDK(
            domains=5,
            interval=INTERVAL,
            measures=MEASURES,
            smoothing=smoothing,
        ),
        roles=dict(
            teacher=Role(init="@teacher"),
            student=Role(init="@start", optimizer=OPTIMIZER),
        ),
        evaluation=EVAL,
        **rest,
    )


def get_config():
    return distil(
        0.5,
        dict(baseline=distil(0.0)),
        claim=dict(
            metric="max_ratio",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.98,
        ),
    )
