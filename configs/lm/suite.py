"""Language methods on additions under one set of conditions: `--config=configs/lm/suite.py:METHOD`,
each name below.

    python -m launch.train --config=configs/lm/suite.py:gkd --workdir=runs/lm/gkd_0 \\
        --config.roles.teacher.init=TEACHER --config.roles.student.init=START
    python tools/reproduce.py --suite=lm            # all of them on seeds 0, 1, 2, and the table

TEACHER and START are runs of configs/lm/carry.py, variants `teacher` and `start`. The same for all:
both of these, responses that a step learns from, steps, Adam with lr 1e-3. A method's own: who
writes the answers, what they are graded by. GRPO and RLAD write eight answers to each prompt, hence
an eighth of the prompts, and have lr 3e-4, the best of 1e-3, 3e-4 and 1e-4 on
seed 3: at 1e-3 RLAD collapses (perplexity 90). A token that its teacher does not expect starts at a
ratio of 1.65, and so may lose 1.4 nats in a wrong answer before the clip stops it, where GRPO's may
lose .2.
"""

from configs.lm import carry
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.grpo import GRPO
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.paced import Paced
from jaxdistill.methods.language.rlad import RLAD
from jaxdistill.methods.language.sequence_kd import SequenceKD
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.tsd_kd import TSDKD
from jaxdistill.objectives.divergence import ForwardKL, JensenShannon, ReverseKL
from jaxdistill.objectives.reward import Exact

STEPS = 1000
ROWS = 64  # responses that a step learns from
GROUP = 8  # of them to a prompt, where a reward ranks them


def methods(**writing):
    """name -> what makes its config; `writing` are the fields of methods that write text."""
    language = lambda cls, **fields: lambda: cls(**fields)
    reinforced = dict(reward=Exact(), group=GROUP, updates=4, **writing)
    return {
        "sft": language(SFT),
        "sequence_kd": language(SequenceKD, **writing),
        "forward_kl": language(KD, divergence=ForwardKL()),
        "reverse_kl": language(KD, divergence=ReverseKL()),
        "jsd": language(KD, divergence=JensenShannon()),
        "gkd": language(
            GKD, divergence=JensenShannon(beta=0.9), on_policy=1.0, **writing
        ),
        "tsd_kd": language(
            TSDKD,
            candidates=2,
            ranking_weight=0.01,
            entropy_weight=0.003,
            **writing,
        ),
        "paced": language(Paced, batches=100, **writing),
        "grpo": language(GRPO, **reinforced),
        "rlad": language(RLAD, clamp="straight_through", **reinforced),
    }


VARIANTS = methods(eos=(12,), pad=13)
REINFORCED = ("grpo", "rlad")
# what grpo and rlad write with
OLD = dict(old=Role(optimizer=Optimizer(algorithm="sgd", clip=0.0)))


def get_config(method="gkd"):
    chosen = lookup(VARIANTS, method, "variant")()
    lr = 3e-4 if method in REINFORCED else 1e-3
    roles = dict(
        student=Role(init="runs/lm/start_0", optimizer=Optimizer(lr=lr, warmup=10))
    )
    roles |= OLD if method in REINFORCED else {}
    roles |= (
        dict(reference=Role(init="runs/lm/start_0")) if method == "grpo" else {}
    )
    roles |= (
        dict(teacher=Role(init="runs/lm/teacher_0"))
        if method not in ("sft", "grpo")
        else {}
    )
    return experiment(
        steps=STEPS,
        data=carry.data(ROWS // GROUP if method in REINFORCED else ROWS),
        method=chosen,
        roles=roles,
        evaluation=TextEval(samples=588),
        checkpoint_every=STEPS,
        log_every=50,
    )
