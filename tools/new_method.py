"""Starts a method: the file, its toy config and its test, each with what has to be filled in.

python tools/new_method.py FAMILY NAME ClassName "Title" arXiv-id
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

METHOD = '''"""{title} (arXiv:{paper}).

The idea in three sentences.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxdistill.core.types import Ctx, Method, Nets, Out, Turn
from jaxdistill.diffusion.process import Flow, Process


@dataclasses.dataclass(frozen=True, kw_only=True)
class {cls}(Method):
    process: Process = Flow()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(("student",), self.loss),)

    def loss(self, net: Nets, ctx: Ctx) -> Out:
        x0 = ctx.batch["x"]
        eps = jax.random.normal(ctx.key("eps"), x0.shape)
        t = jnp.ones(x0.shape[:1])
        difference = net.student(self.process.add_noise(x0, eps, t), t).x0 - x0  # eq. 1
        return Out(jnp.mean(difference**2))
'''
TOY = '''"""{title} (arXiv:{paper}) on a Gaussian mixture with an exact teacher.

    python -m launch.train --config=configs/toy/{name}.py --workdir=runs/toy_{name}

The claim: what the paper claims, at small scale.
"""

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.diffusion.denoiser import Denoiser


def get_config():
    return experiment(
        data=spec("data.mixtures:Mixture"),
        method=spec("methods.{family}.{name}:{cls}"),
        roles=dict(teacher=Role(init="exact"), student=Role(model=spec("models.mlp:MLP"), denoiser=Denoiser(), init="fresh")),
        evaluation=spec("evals.points:PointEval"),
        claim=dict(metric="energy", model="student@1", baseline="teacher@1", better="lower", ratio=0.1),
    )
'''
TEST = '''"""{title}: the specification's checks."""

from jaxdistill.methods.{family}.{name} import {cls}


def test_the_first_check():
    raise NotImplementedError({cls})
'''


def main(argv: list[str]) -> int:
    if len(argv) != 5:
        print(__doc__.strip().splitlines()[-1], file=sys.stderr)
        return 2
    family, name, cls, title, paper = argv
    fields = dict(family=family, name=name, cls=cls, title=title, paper=paper)
    files = {
        ROOT / f"jaxdistill/methods/{family}/{name}.py": METHOD,
        ROOT / f"configs/toy/{name}.py": TOY,
        ROOT / f"tests/methods/{family}/test_{name}.py": TEST,
    }
    taken = [str(path) for path in files if path.exists()]
    if taken or not (ROOT / f"jaxdistill/methods/{family}").is_dir():
        print(f"refused: {taken[0]} exists" if taken else f"refused: no family folder jaxdistill/methods/{family}", file=sys.stderr)
        return 2
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(**fields))
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
