"""Cases of the benchmarks: configs of small networks, each with a hand-written step and with the
matrix products of the step alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import optax

from jaxdistill.core import build, sharding
from jaxdistill.core.build import Role, experiment
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx
from jaxdistill.data.synthetic import Synthetic
from jaxdistill.diffusion.denoiser import Denoiser, Velocity
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.trajectory.meanflow import MeanFlow
from jaxdistill.methods.trajectory.scm import SCM
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.heads import Discriminator, TimeWeight
from jaxdistill.models.language.lm import LM
from jaxdistill.run.experiment import Experiment
from jaxdistill.run.programs import make_programs
from launch._command import load_config, main, no_command
from tools import bench_products

DIT = dict(size=16, patch=4, channels=4, dim=128, depth=4, heads=4)
LLAMA = dict(dim=128, mlp=384, heads=4, depth=4, max_length=160)


def diffusion(method, **roles):
    """A config with 32 samples of 16 x 16 x 4 and DiTs in float32.

    `roles` are those besides the student; None stands for a network like the student's.
    """
    arrays = dict(x="normal 16 16 4", cond="integers 10", null_cond="constant 10")
    model = DiT(**DIT, second_time="meanflow" in type(method).__module__)
    net = dict(
        model=model,
        denoiser=Denoiser(param=Velocity(time_scale=1000.0)),
        init="fresh",
        optimizer=Optimizer(lr=1e-4),
    )
    settings = {"student": Role(**net)}
    for name, role in roles.items():
        settings[name] = Role(**net) if role is None else role
    return experiment(
        steps=100,
        data=Synthetic(batch_size=32, arrays=arrays),
        method=method,
        roles=settings,
    )


def language(method, vocab=512):
    """A config with 8 texts of 160 tokens and Llamas."""
    arrays = dict(tokens=f"integers {vocab} 160", mask="constant 1 160")
    net = dict(
        model=LM(vocab=vocab, **LLAMA),
        init="fresh",
        optimizer=Optimizer(lr=1e-4),
    )
    return experiment(
        steps=100,
        data=Synthetic(batch_size=8, arrays=arrays),
        method=method,
        roles=dict(teacher=Role(**net), student=Role(**net)),
    )


def digits():
    """The config of DMD2 on digits, with a random teacher."""
    config = load_config("configs/digits/dmd2.py")
    with config.unlocked():
        config.roles.teacher.model = build.plain(DiT())
        config.roles.teacher.denoiser = build.plain(
            Denoiser(param=Velocity(time_scale=1000.0))
        )
        config.roles.teacher.init = "fresh"
    return config


def scm():
    return diffusion(SCM(), teacher=None, weight=Role(model=TimeWeight()))


def dmd2():
    disc = Role(model=Discriminator(dim=128, classes=10))
    return diffusion(DMD2(), teacher=None, fake=None, disc=disc)


CASES = {
    "digits_dmd2": digits,
    "meanflow": lambda: diffusion(MeanFlow()),
    "meanflow_reference": lambda: diffusion(MeanFlow()),
    "scm": scm,
    "dmd2": dmd2,
    "gkd": lambda: language(GKD(on_policy=1.0, prompt_length=32)),
    "kd": lambda: language(KD()),
}


class Case:
    """Sides of one config: `engine(i)`, `hand(i)` and `products(i)` take step i and return its
    results.
    """

    def __init__(self, config):
        with config.unlocked():
            config.mesh = build.plain(MeshShape(data=1, fsdp=1, tensor=1))
        experiment = Experiment(config, Path("unused"))
        self.experiment = experiment
        method = experiment.method
        nets = experiment.nets
        key = jax.random.key(0)
        start = {}
        for i, role in enumerate(nets):
            if role in method.frozen:
                start[role] = nets[role].init(jax.random.fold_in(key, 9 + i))
        stage = method.stages(experiment.settings.steps)[0]
        self.programs = make_programs(
            experiment, nets, stage, start, experiment.data.spec()
        )
        self.state = self.programs.init(key, start)
        self.rng = jax.random.key(1)
        self.put = sharding.put_batch(experiment.mesh, experiment.settings.rules)
        self.batch = self.put(experiment.data.batch(0, slice(None)))
        self.method = method
        self.nets = nets

    def prepare_hand(self):
        """Makes the weights and optimiser states of the hand-written side."""
        method = self.method
        self.params = jax.tree.map(jnp.copy, self.state.params)
        self.frozen = jax.tree.map(jnp.copy, self.state.frozen)
        self.txs = {}
        for role in method.inits:
            optimizer = self.experiment.roles[role].optimizer
            self.txs[role] = optimizer.make(1000, axes=self.nets[role].axes)
        self.opt = {role: self.txs[role].init(p) for role, p in self.params.items()}
        self.ema = {
            role: jax.tree.map(jnp.copy, self.params[role]) for role in method.ema
        }
        self.memory = method.memory()
        self.by_hand = jax.jit(
            self._step, static_argnums=5, donate_argnums=(0, 1, 2)
        )

    def prepare_products(self):
        """Compiles the products of each pattern of turns."""
        self.alone = {}
        self.work = {}
        programs = self.programs
        for active in programs.patterns:
            traced = programs.step.trace(
                programs.abstract, programs.batch, self.rng, active
            )
            found = bench_products.shapes(traced.jaxpr.jaxpr)
            self.alone[active] = bench_products.alone(found)
            self.work[active] = bench_products.operations(found)

    def products(self, i):
        return self.alone[self.programs.active_at(i)]()

    def operations(self, i):
        """Floating-point operations of `products(i)`."""
        return self.work[self.programs.active_at(i)]

    def engine(self, i, batch=None):
        batch = self.batch if batch is None else batch
        active = self.programs.active_at(i)
        self.state, metrics = self.programs.step(
            self.state, batch, self.rng, active
        )
        return metrics

    def hand(self, i):
        active = tuple(
            n for n, turn in enumerate(self.method.turns) if turn.when(i)
        )
        self.params, self.opt, self.ema, loss = self.by_hand(
            self.params, self.opt, self.ema, self.batch, jnp.int32(i), active
        )
        return loss

    def _step(self, params, opt, ema, batch, i, active):
        """A step without counts, norms, changes of memory and metrics."""
        rng = jax.random.fold_in(self.rng, i)
        loss = 0.0
        for n in active:
            turn = self.method.turns[n]
            key = jax.random.fold_in(rng, n)
            weights = {
                **self.frozen,
                **params,
                **{f"ema_{role}": w for role, w in ema.items()},
            }
            gathered = batch
            if turn.gather is not None:
                ctx = Ctx(batch, key, i, self.memory)
                gathered = turn.gather(bind(self.nets, weights), ctx)
            ctx = Ctx(jax.lax.stop_gradient(gathered), key, i, self.memory)

            def objective(moving, weights=weights, ctx=ctx, turn=turn):
                out = turn.loss(bind(self.nets, {**weights, **moving}), ctx)
                return out.loss / (1 if out.count is None else out.count)

            loss, grads = jax.value_and_grad(objective)(
                {role: params[role] for role in turn.moves}
            )
            params = dict(params)
            opt = dict(opt)
            ema = dict(ema)
            for role in turn.moves:
                updates, opt[role] = self.txs[role].update(
                    grads[role], opt[role], params[role]
                )
                params[role] = optax.apply_updates(params[role], updates)
                if role in ema:
                    ema[role] = optax.incremental_update(
                        params[role], ema[role], 0.01
                    )
        return params, opt, ema, loss


if __name__ == "__main__":
    main(no_command, __doc__)
