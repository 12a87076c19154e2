"""TSD-KD (arXiv:2603.13260) on additions, each student graded on what it writes itself.

    python -m launch.train --config=configs/toy/tsd_kd.py --workdir=runs/toy_tsd_kd

2 CPU cores, about two minutes. Student and teacher start from supervised training on the sums, the
student's cut short. The claim: after the same steps, greedy `accuracy` on sums that were kept back
is not below that of GKD with the same divergence (`baseline`). It does not hold: .283 against .330,
.123 against .125, .225 against .318 on seeds 0 to 2. `--config.method.ranking_weight=0`,
`gate_temperature=0` and `entropy_weight=0` are the ablations.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.language import Carry
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.tsd_kd import TSDKD
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import JensenShannon

SUMS = dict(digits=2, batch_size=64)
WRITING = dict(eos=(12,), pad=13)


def train(steps: int):
    """Supervised training on the sums."""
    model = LM(vocab=14, dim=64, mlp=128, heads=4, depth=2, max_length=10)
    return experiment(
        steps=steps,
        data=Carry(**SUMS),
        method=SFT(),
        roles=dict(
            student=Role(
                model=model,
                optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20),
            )
        ),
        evaluation=TextEval(),
    )


def distil(method, data=None, *, steps=150, runs=None, **rest):
    return experiment(
        steps=steps,
        runs=dict(start=train(200), teacher=train(600), **(runs or {})),
        data=data or Carry(**SUMS),
        method=method,
        roles=dict(
            teacher=Role(init="@teacher"),
            student=Role(init="@start", optimizer=Optimizer(lr=1e-3, warmup=10)),
        ),
        evaluation=TextEval(),
        **rest,
    )


def get_config():
    return distil(
        TSDKD(
            candidates=2,
            ranking_weight=0.01,
            entropy_weight=0.003,
            **WRITING,
        ),
        runs=dict(
            baseline=distil(
                GKD(divergence=JensenShannon(beta=0.9), on_policy=1.0, **WRITING)
            )
        ),
        claim=dict(
            metric="accuracy",
            model="student",
            baseline="baseline",
            better="higher",
            ratio=1.0,
        ),
    )
