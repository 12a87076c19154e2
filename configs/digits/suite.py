"""Methods on the digits under one set of conditions: `--config=configs/digits/suite.py:METHOD`,
each name below.

    python -m launch.train --config=configs/digits/suite.py:dmd2 --workdir=runs/digits/dmd2_0 \\
        --config.roles.teacher.init=TEACHER
    python tools/reproduce.py --suite=digits        # all of them on seeds 0, 1, 2, and the table

TEACHER is a run of configs/digits/teacher.py. The same for all: that teacher, the student's network
(0.33 M weights; those that take two times have one more embedding), batch, number of student
updates, Adam with lr 2e-4, average, evaluation. A method's own: what it trains besides the student,
how often, and the constants that its paper fixes.
"""

import dataclasses

from jaxdistill.core.build import Lora, Role, experiment
from jaxdistill.core.optim import Ema, Optimizer
from jaxdistill.core.types import lookup
from jaxdistill.data.digits import Digits
from jaxdistill.diffusion.guidance import Random
from jaxdistill.evals.images import ImageEval
from jaxdistill.methods.distribution.diff_instruct import DiffInstruct
from jaxdistill.methods.distribution.disback import DisBack
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.embedding_loss import EmbeddingLoss
from jaxdistill.methods.distribution.flash_dmd import FlashDMD
from jaxdistill.methods.distribution.multi_student import MultiStudent
from jaxdistill.methods.distribution.phased_dmd import PhasedDMD
from jaxdistill.methods.distribution.snoopi import PGSB
from jaxdistill.methods.distribution.swiftbrush import SwiftBrush
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.methods.trajectory.consistency import Consistency
from jaxdistill.methods.trajectory.meanflow import MeanFlowDistillation
from jaxdistill.methods.trajectory.progressive import Progressive
from jaxdistill.methods.trajectory.reflow import Reflow
from jaxdistill.methods.trajectory.scm import SCM
from jaxdistill.methods.trajectory.twinflow import TunedTwinFlow
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.heads import Discriminator, Heads, TimeWeight
from jaxdistill.models.vision.judges import ConvFeatures, Identity
from jaxdistill.objectives.partition import Consecutive

UPDATES = 400  # of the student
STUDENT = Role(optimizer=Optimizer(lr=2e-4, b2=0.99, warmup=20), ema=Ema(rate=0.98))
GENERATOR = Optimizer(lr=2e-4, b1=0.0, b2=0.99, warmup=20)
ADVERSARY = Optimizer(lr=4e-4, b1=0.0, b2=0.99, warmup=20)
DISC = Role(
    model=Discriminator(dim=64, classes=10),
    optimizer=Optimizer(lr=1e-3, b1=0.0, b2=0.99),
)
FOUR = (0.999, 0.749, 0.499, 0.249)  # times of a student that renoises
ONE = ("uni_instruct",)  # made for one step, and no more
CRITICS = 5  # updates of the fake score to one of the student


def matching(cls, *, critics=CRITICS, roles={}, **fields):
    """Distribution matching: a fake score beside the student, `critics` steps of the engine to an
    update of the student.
    """
    method = cls(critic_steps=critics, **fields)
    return (
        method,
        critics,
        {
            "student": Role(optimizer=GENERATOR, ema=Ema(rate=0.98)),
            "fake": Role(optimizer=ADVERSARY),
            **roles,
        },
    )


def trajectory(cls, *, student=STUDENT, roles={}, **fields):
    """Consistency along trajectories: every step of the engine updates the student."""
    return cls(**fields), 1, {"student": student, **roles}


def two_times():
    """The student's role where the network takes a second time."""
    from configs.digits import teacher

    role = teacher.get_config().roles.student
    return Role(
        model=DiT(second_time=True),
        denoiser=role.denoiser,
        init="teacher",
        optimizer=STUDENT.optimizer,
        ema=STUDENT.ema,
    )


def phased():
    """Two experts of two steps each; the phases share the student's updates."""
    method = PhasedDMD(critic_steps=CRITICS, student_times=FOUR)
    role = lambda name: (
        Role(optimizer=ADVERSARY)
        if name.startswith("fake")
        else Role(optimizer=GENERATOR)
    )
    return method, CRITICS, {name: role(name) for name in method.inits}


def flash():
    """The GAN on random convolutions of the pixels."""
    return matching(
        FlashDMD,
        critics=1,
        student_times=FOUR,
        gan_weight=3e-2,
        taps=(0, 1),
        roles=dict(
            decoder=Role(model=Identity()),
            features=Role(
                model=ConvFeatures(channels=1, widths=(64, 128), patch=1),
                init="random",
            ),
            disc=Role(model=Heads(dims=(64, 128)), optimizer=DISC.optimizer),
        ),
    )


def lora(name, **fields):
    """The fake score is an adapter on the teacher, its first update joint with the student's."""
    fake = Role(
        lora=Lora(rank=16, alpha=32.0),
        optimizer=Optimizer(lr=2e-3, b1=0.0, b2=0.99),
    )
    return matching(name, roles=dict(fake=fake), **fields)


def two_students():
    """Two students, of five labels each, on half of the batch each."""
    host = DMD2(
        critic_steps=CRITICS,
        gan_weight=3e-2,
        taps=(1,),
        student_times=FOUR,
    )
    partition = Consecutive(cells=2, classes=10)
    method = MultiStudent(
        partition=partition,
        adm=host,
        shares=(0.0, 0.0, 1.0),
    )
    roles = {
        "student": Role(optimizer=GENERATOR, ema=Ema(rate=0.98)),
        "fake": Role(optimizer=ADVERSARY),
        "disc": DISC,
    }
    return (
        method,
        CRITICS,
        {name: dataclasses.replace(role, bank=2) for name, role in roles.items()},
    )


def embedding():
    """Diff-Instruct's student also meets real data, in the features of random networks."""
    host, steps, roles = matching(DiffInstruct, student_times=FOUR)
    archs = ("convnet-2", "plain-3")
    return (
        EmbeddingLoss(host=host, archs=archs),
        steps,
        roles,
    )


VARIANTS = {
    "swiftbrush": lambda: lora(
        SwiftBrush, guidance=1.0, fake_guidance=1.0, student_times=FOUR
    ),
    "snoopi": lambda: lora(
        PGSB,
        guidance=Random(low=0.5, high=2.0),
        fake_guidance=Random(low=0.5, high=2.0),
        student_times=FOUR,
    ),
    "disback": lambda: matching(
        DisBack,
        checkpoints=4,
        record_every=20,
        interval=100,
        student_times=FOUR,
        gan_weight=3e-2,
        taps=(1,),
        roles=dict(disc=DISC, path=Role(init="teacher", bank=5)),
    ),
    "uni_instruct": lambda: matching(
        UniInstruct,
        critic_only=100,
        reverse_until=500,
        taps=(1,),
        roles=dict(disc=DISC),
    ),
    "embedding_loss": embedding,
    "multi_student": two_students,
    "diff_instruct": lambda: matching(DiffInstruct, student_times=FOUR),
    "dmd2": lambda: matching(
        DMD2, student_times=FOUR, gan_weight=3e-2, taps=(1,), roles=dict(disc=DISC)
    ),
    "phased_dmd": phased,
    "flash_dmd": flash,
    "twinflow": lambda: trajectory(
        TunedTwinFlow, training_guidance=0.0, student=two_times()
    ),
    "consistency": lambda: trajectory(
        Consistency, levels=33, huber=0.03, student_times=(1.0, 0.75, 0.5, 0.25)
    ),
    "scm": lambda: trajectory(
        SCM,
        tangent_warmup=200,
        student_times=(1.5707963, 1.2490458, 0.7853982, 0.3217506),
        roles=dict(
            weight=Role(model=TimeWeight(), optimizer=Optimizer(lr=1e-4, b2=0.99))
        ),
    ),
    "meanflow": lambda: trajectory(
        MeanFlowDistillation, flow_share=0.5, student=two_times()
    ),
    "progressive": lambda: trajectory(Progressive, teacher_steps=32),
    "reflow": lambda: trajectory(Reflow, batches=60, solver_steps=25),
}


def get_config(method="dmd2"):
    chosen, steps, roles = lookup(VARIANTS, method, "variant")()
    return experiment(
        steps=UPDATES * steps,
        data=Digits(batch_size=64),
        method=chosen,
        roles={"teacher": Role(init="runs/digits/teacher_0"), **roles},
        evaluation=ImageEval(
            student_steps=(1,) if method in ONE else (1, 2, 4),
            teacher_steps=(),
        ),
        checkpoint_every=UPDATES * steps,
        log_every=20,
    )
