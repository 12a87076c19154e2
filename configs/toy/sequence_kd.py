"""Sequence-level distillation (arXiv:1606.07947) on additions: the answers are the teacher's, never
the data's.

    python -m launch.train --config=configs/toy/sequence_kd.py --workdir=runs/toy_sequence_kd

2 CPU cores, about a minute. Student and teacher start from supervised training on the sums, the
student's cut short. The claim: greedy `accuracy` on sums that were kept back rises over that of the
start (`baseline`, the same run once more), to 1.3 times. Measured on seeds 0 to 2: .340, .082, .246
against .113, .074, .098: it does not hold on seed 1, whose teacher is right on .66 of the sums
(.96, .91 on the others).
"""

from configs.toy.tsd_kd import WRITING, distil, train
from jaxdistill.methods.language.sequence_kd import SequenceKD


def get_config():
    return distil(
        SequenceKD(**WRITING),
        runs=dict(baseline=train(200)),
        claim=dict(
            metric="accuracy",
            model="student",
            baseline="baseline",
            better="higher",
            ratio=1.3,
        ),
    )
