"""DisBack (arXiv:2408.15991) on a Gaussian mixture: a learnt teacher's path, walked back, on
Diff-Instruct as the host.

    python -m launch.train --config=configs/toy/disback.py --workdir=runs/toy_disback

About four minutes of CPU time, two trainings of the teacher and the host (`baseline`) included. The
claim: at one step the student's energy distance is at most a tenth of the teacher's at one step.

The paper's speed-up does not appear here. Seed 0 and mixture 0, 4000 steps in all, of which 500
record: energy .0040 against .0036 of the host, KL of the modes' shares .0047 against .0088, quality
.62 both. The host reaches an energy of .006 after 600 steps, DisBack after 2500
(`--config.eval_every=200`): its energy hardly falls before step 1700, when the original teacher
becomes the target. A guess, not checked: the fake score learns the student's law within the first
of the checkpoints. `--config.method.record_every=20 --config.method.interval=100` is a shorter
path: energy .0041 (seed 0).
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.data.mixtures import Mixture
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.diffusion.times import Uniform
from jaxdistill.evals.points import PointEval
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.disback import DisBackDiffInstruct
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from jaxdistill.models.denoisers.mlp import MLP

ABLATIONS = {
    "no path: the host alone": ("claim.model=baseline@1",),
    "a shorter path (not in the paper)": (
        "method.record_every=20",
        "method.interval=100",
    ),
}
DATA = Mixture(seed=0, modes=8, std=0.05, labelled=False)
EVALUATION = PointEval(student_steps=(1,), teacher_steps=(50, 1))


def pretrain():
    """The teacher: what it says off its data's support is what it happened to learn."""
    student = Role(
        model=MLP(width=96, depth=2),
        denoiser=Denoiser(),
        optimizer=Optimizer(lr=2e-3, schedule="cosine"),
        ema=Ema(rate=0.99),
    )
    method = FlowMatching(times=Uniform(), label_dropout=0.0)
    return experiment(
        steps=3000, data=DATA, method=method, roles=dict(student=student)
    )


def distil(method, runs=None, roles=None, **rest):
    return experiment(
        steps=4000,
        data=DATA,
        method=method,
        roles=dict(
            teacher=Role(init="@teacher"),
            student=Role(
                optimizer=Optimizer(lr=5e-4, b1=0.0, schedule="cosine"),
                ema=Ema(rate=0.99),
            ),
            fake=Role(optimizer=Optimizer(lr=1e-3, b1=0.0)),
            **(roles or {}),
        ),
        runs=dict(teacher=pretrain(), **(runs or {})),
        evaluation=EVALUATION,
        checkpoint_every=2000,
        **rest,
    )


def get_config():
    host = DiffInstruct(critic_steps=5)
    disback = DisBackDiffInstruct(
        checkpoints=5,
        record_every=100,
        interval=300,
    )
    return distil(
        disback,
        runs=dict(baseline=distil(host)),
        roles=dict(path=Role(init="teacher", bank=6)),
        claim=dict(
            metric="energy",
            model="student@1",
            baseline="teacher@1",
            better="lower",
            ratio=0.1,
        ),
    )
