"""Self-distillation with labels (arXiv:2102.13088) at the settings of the paper's code, on stored
records.

    python -m launch.train --config=configs/recipes/self_distillation.py --workdir=DIR \\
        --config.data.path=RECORDS

The paper: ResNets on CIFAR-10, alpha 0.6, five rounds of 75 epochs counting the first, Adam at
1e-4, batch 16, penalty 1e-4. Departures: a perceptron of 1.4e8 weights on 32x32x4 latents in place
of the ResNet on images, until that family lands; no augmentation.
"""

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.data.arrayrecord import ArrayRecords
from jaxdistill.methods.language.self_distillation import SelfDistillation
from jaxdistill.models.vision.perceptron import Perceptron


def get_config():
    return experiment(
        steps=5 * 75 * 3125,
        data=ArrayRecords(batch_size=16),
        method=SelfDistillation(alpha=0.6, rounds=5, batches=3125),
        roles=dict(
            student=Role(
                model=Perceptron(
                    inputs=4096,
                    width=6144,
                    layers=4,
                    classes=1000,
                ),
                optimizer=Optimizer(lr=1e-4, clip=0.0),
            )
        ),
        checkpoint_every=3125,
    )
