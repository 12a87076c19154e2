"""PACED (arXiv:2603.11178) on additions among four times as many problems that nobody can solve.

    python -m launch.train --config=configs/toy/paced.py --workdir=runs/toy_paced

2 CPU cores, about three minutes. Student and teacher start from supervised training on the sums,
the student's cut short. The claim: after the same updates, greedy `accuracy` on sums that were kept
back is higher than that of distillation with equal weights (`baseline`: exponents 0), and no more
than that. Leaving out every problem with pass rate 0 or 1 is a large part of the difference, and
the shape of the kernel in between is not told apart here; the mean divergence from the teacher on
held-out sums, which has the problems that the student does not solve in it, is not lower (seed 0:
0.64 against 0.51).

The claim holds on seeds 0 to 2, and on 7 of 13 pairs (seed, data.seed) that nobody had looked at
before (on 10 it is higher at all):

    pair     ratio  paced  equal  teacher  start  kept     pair     ratio  paced  equal  teacher
    start  kept
    3, 3     1.12   .531   .475   .943     .246   1052     13, 2    1.06   .744   .699   1.000
    .166    954
    4, 4     2.57   .381   .148   .941     .074    582     14, 13   1.11   .291   .262   .930
    .096    680
    5, 5     2.20   .275   .125   .959     .096    624     15, 7     .78   .445   .574   .988
    .082    635
    6, 6     1.67   .098   .059   .135     .076    685     16, 3    1.03   .201   .195   .404
    .090    636
    7, 7     1.00   .746   .744   1.000    .371   1347     17, 11    .69   .320   .463   .986
    .133    823
    11, 5    1.38   .572   .414   .996     .158    808     18, 4     .67   .148   .223   .971
    .035    433
    12, 9    1.48   .361   .244   .953     .160    779

(`--config.seed=3 --config.data.seed=3` and so on; accuracies; kept: problems of the first pool, of
9,600, that are neither never nor always solved.) The mean difference is .038 with a standard error
of .031: no gain is shown over all of them. The rank correlation of the ratio with the accuracy of
equal weights is -.56 (a part of which is that this is the denominator), with the teacher's -.43,
with the start's -.03, with the problems kept -.13: nothing that is known before the run tells
whether the claim will hold. How far a student comes is a matter of when it finds out how to carry,
and this comes suddenly: supervised starts of 250, 300 and 400 steps in place of 200 end at .107 to
.160, .111 to .273 and .160 to .863 on three pairs, so that a longer one makes pass rates no
steadier, and the toy is left as it is.
"""

from configs.toy.tsd_kd import WRITING, distil
from jaxdistill.data.language import JunkCarry
from jaxdistill.methods.language.paced import Paced


def paced(runs=None, claim=None, **exponents):
    return distil(
        Paced(batches=300, **exponents, **WRITING),
        JunkCarry(digits=2, batch_size=32),
        steps=300,
        runs=runs,
        claim=claim,
    )


def get_config():
    return paced(
        dict(baseline=paced(a=0.0, b=0.0)),
        dict(
            metric="accuracy",
            model="student",
            baseline="baseline",
            better="higher",
            ratio=1.1,
        ),
    )
