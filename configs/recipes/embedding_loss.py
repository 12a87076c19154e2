r"""Embedding loss (arXiv:2604.22379) beside a SiDA-like host on class-conditional CIFAR-10,
on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/embedding_loss.py --workdir=DIR \
        --config.data.path=CIFAR10 \
        --config.roles.teacher.init=TEACHER

CIFAR10 and TEACHER as in configs/recipes/uni_instruct.py, whose reverse KL is the host (score
identity with a GAN). The paper: FID 1.380 at one step with its best distribution-matching host,
1.475 unconditional, in up to 80 % fewer iterations. Its networks, weight and batch sizes are not
published: two random networks a step from the pool below, weight .3 of the host's gradient, two
real samples per generated one, labels inside the networks. Batch 256 (512 real), Adam 1e-5.
Departures: as there.
"""

from configs.recipes.uni_instruct import roles
from jaxdistill.core.build import experiment
from jaxdistill.data.images import ParquetImages
from jaxdistill.methods.distribution.embedding_loss import EmbeddingLoss
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.objectives.fdivergence import ReverseKL


def get_config():
    host = UniInstruct(divergence=ReverseKL(), taps=(2,))
    return experiment(
        steps=400_000,
        data=ParquetImages(batch_size=512, flip=True),
        method=EmbeddingLoss(
            host=host,
            real_per_fake=2,
            labelled=True,
        ),
        roles=roles(),
        checkpoint_every=5_000,
        log_every=100,
    )
