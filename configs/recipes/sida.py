r"""SiDA (arXiv:2410.14919), class-conditional CIFAR-10 on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/sida.py --workdir=DIR \
        --config.data.path=CIFAR10 --config.roles.teacher.init=TEACHER

CIFAR10 and TEACHER as in configs/recipes/uni_instruct.py. The paper's own discriminator, the mean
over channels of the fake score's bottleneck. The constants of the code that SiDA and Uni-Instruct
share: batch 256, Adam 1e-5 (betas 0, .999) on both sides, one update each by turns, the critics'
gradients clipped by value, 100 k images before the student moves and 200 k before its GAN acts (the
latter uncertain for SiDA), loss scales 100 and .01. FID at one step: SiD2A, which starts from SiD's
student (`--config.roles.student.init=RUN` of configs/recipes/sid.py), 1.396 and 1.499 without
labels; from scratch 1.52 without labels; ImageNet-64 1.11. The length is uncertain.

Departures: no dropout (.13) and no augmentation of the critics' batches (.12); logits are averaged
over a sample's map, in the paper over all samples of a device.
"""

from configs.recipes.uni_instruct import roles
from jaxdistill.core.build import experiment
from jaxdistill.data.images import ParquetImages
from jaxdistill.methods.distribution.sida import SharedSiDA


def get_config():
    networks = roles()
    del networks["disc"]
    return experiment(
        steps=1_171_875,
        data=ParquetImages(batch_size=256, flip=True),
        method=SharedSiDA(taps=(2,), alpha=1.0, critic_only=391, reverse_until=782),
        roles=networks,
        checkpoint_every=5_000,
        log_every=100,
    )
