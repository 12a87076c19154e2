r"""SIM (arXiv:2410.16794), class-conditional CIFAR-10 on EDM's DDPM++.

    python -m launch.train --config=configs/recipes/sim.py --workdir=DIR \
        --config.data.path=CIFAR10 --config.roles.teacher.init=TEACHER

CIFAR10 and TEACHER as in configs/recipes/uni_instruct.py; of the data the labels are read. The
paper: the pseudo-Huber distance, FID 1.96 at one step (2.06 without labels); its text-to-image
student of PixArt-alpha, 600 M weights, reaches an aesthetic score of 6.42. Uncertain: rate, batch,
noise levels and length are SiD's (configs/recipes/sid.py), as are the departures; so is the
distance's c.
"""

from configs.recipes.sid import cifar10
from jaxdistill.methods.distribution.sim import SIM


def get_config():
    return cifar10(SIM())
