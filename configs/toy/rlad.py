"""RLAD (arXiv:2602.22495) on questions to be known by heart, with a teacher that knows them.

    python -m launch.train --config=configs/toy/rlad.py --workdir=runs/toy_rlad

2 CPU cores, about a minute. The claim: after the same updates from the same start and with the same
reward, the greedy `accuracy` is at least 1.3 times that of GRPO (`baseline`), which has no teacher.
"""

from configs.toy.grpo import improve, train
from jaxdistill.core.build import Role
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.methods.language.rlad import RLAD
from jaxdistill.objectives.reward import Share

METHOD = dict(reward=Share(), updates=4, clip_high=0.28, kl_weight=0.0)


def get_config():
    return improve(
        RLAD(clamp="straight_through", **METHOD),
        runs=dict(teacher=train(40), baseline=improve(GRPO(**METHOD))),
        roles=dict(teacher=Role(init="@teacher")),
        claim=dict(
            metric="accuracy",
            model="student",
            baseline="baseline",
            better="higher",
            ratio=1.3,
        ),
    )
