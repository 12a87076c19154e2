"""TSD-KD (arXiv:2603.13260) on additions, each student graded on what it writes itself.

    python -m launch.train --config=configs/toy/tsd_kd.py --workdir=runs/toy_tsd_kd

2 CPU cores, about two minutes. The claim: after the same steps from the same start, greedy `accuracy` on sums that were
kept back is not below that of GKD with the same divergence (`baseline`).
`--config.method.ranking_weight=0`, `gate_temperature=0` and `entropy_weight=0` are the ablations.
"""

from configs.toy.grpo import DATA, OPTIMIZER, WRITING, train
from jaxdistill.core.build import Role, experiment, spec


def distil(method, runs=None, **rest):
    return experiment(
        steps=150,
        runs=dict(start=train(200), teacher=train(600), **(runs or {})),
        data=spec("data.language:Carry", **DATA),
        method=method,
        roles=dict(teacher=Role(init="@teacher"), student=Role(init="@start", optimizer=OPTIMIZER)),
        evaluation=spec("evals.text:TextEval"),
        **rest,
    )


def get_config():
    return distil(
        spec("methods.language.tsd_kd:TSDKD", **WRITING),
        dict(baseline=distil(spec("methods.language.gkd:GKD", beta=0.9, on_policy=1.0, **WRITING))),
        claim=dict(metric="accuracy", model="student", baseline="baseline", better="higher", ratio=1.0),
    )
