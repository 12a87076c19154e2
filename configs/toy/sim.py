"""SIM (arXiv:2410.16794) on a Gaussian mixture with an exact teacher: one step close to the
distribution, without data.

    python -m launch.train --config=configs/toy/sim.py --workdir=runs/toy_sim

2 CPU cores, about a minute. The claim: at one step the student's energy distance is at most a tenth
of the teacher's at one step. Measured on seed 10 (seed and data.seed) alone so far: .0046 against
.444. `--config.method.huber=1000` is the squared distance;
`--config.data.seed=N` makes another mixture.
"""

from configs.toy.sid import distil
from jaxdistill.methods.distribution.sim import SIM

ABLATIONS = {"squared distance": ("method.huber=1000.0", "method.scale=100000.0")}


def get_config():
    return distil(SIM(critic_steps=2))
