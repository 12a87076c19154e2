"""GKD (arXiv:2306.13649) on a synthetic language with an exact teacher: what the student writes
stays near the teacher.

    python -m launch.train --config=configs/toy/gkd.py --workdir=runs/toy_gkd

2 CPU cores, about two minutes. A student too small for the language starts from supervised training
(`start`), as in the paper. The claim: after the same further steps, the student that is graded on
its own text with a divergence near the reverse KL writes text nearer to the teacher's
(`rollout_reverse_kl`, per token on its own samples) than one that goes on with forward KL on given
text (`baseline`).
"""

from configs.toy.kd import DATA
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import JensenShannon

STUDENT = LM(vocab=24, dim=24, mlp=48, heads=2, depth=1, max_length=48)
OPTIMIZER = Optimizer(lr=3e-3, schedule="cosine", warmup=20)


def start():
    return experiment(
        steps=300,
        data=Markov(**DATA),
        method=SFT(),
        roles=dict(student=Role(model=STUDENT, optimizer=OPTIMIZER)),
        evaluation=TextEval(prompt_length=8),
    )


def distil(method, runs=None, **rest):
    return experiment(
        steps=400,
        runs=dict(start=start(), **(runs or {})),
        data=Markov(**DATA),
        method=method,
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(init="@start", optimizer=OPTIMIZER),
        ),
        evaluation=TextEval(prompt_length=8),
        **rest,
    )


def get_config():
    return distil(
        GKD(divergence=JensenShannon(beta=0.9), on_policy=1.0, prompt_length=8),
        dict(baseline=distil(KD())),
        claim=dict(
            metric="rollout_reverse_kl",
            model="student",
            baseline="baseline",
            better="lower",
            ratio=0.9,
        ),
    )
