"""GKD (arXiv:2306.13649) on a synthetic language with an exact teacher: what the student writes stays near the teacher.

    python -m launch.train --config=configs/toy/gkd.py --workdir=runs/toy_gkd

2 CPU cores, about two minutes. The claim: after the same steps, a student too small for the language that is also
graded on its own text is closer to the teacher on its own text (`rollout_kl`) than one distilled on given text alone
(`baseline`, forward KL).
"""

from configs.toy.kd import DATA
from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer


def distil(method, **rest):
    return experiment(
        steps=600,
        data=spec("data.language:Markov", **DATA),
        method=method,
        roles=dict(
            teacher=Role(init="exact"),
            student=Role(
                model=spec("models.lm:LM", vocab=24, dim=24, mlp=48, heads=2, depth=1, max_length=48),
                optimizer=Optimizer(lr=3e-3, schedule="cosine", warmup=20),
            ),
        ),
        evaluation=spec("evals.text:TextEval", prompt_length=8),
        **rest,
    )


def get_config():
    return distil(
        spec("methods.language.gkd:GKD", beta=0.9, on_policy=1.0, prompt_length=8),
        runs=dict(baseline=distil(spec("methods.language.kd:KD"))),
        claim=dict(metric="rollout_kl", model="student", baseline="baseline", better="lower", ratio=0.95),
    )
