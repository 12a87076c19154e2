"""What a config stands for: method, data, networks, shardings and where every role's first weights
come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxdistill import interop
from jaxdistill.core import build, lora, sharding
from jaxdistill.core.bank import bank
from jaxdistill.core.fields import Positive, shown
from jaxdistill.core.net import Net, make_net
from jaxdistill.core.step import bind
from jaxdistill.core.storage import quantized
from jaxdistill.core.types import Method, Params, Refused, named_key, nearest, one_line
from jaxdistill.data.abilities import HasExactTeacher, text_end
from jaxdistill.data.base import Dataset
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.base import Evaluation
from jaxdistill.run import records
from jaxdistill.run.checkpoint import load_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run's final evaluation is held against: value <= ratio * baseline ("lower"), or >=
    ("higher").

    Models are rows of the table, "name" or "name@nfe".
    """

    metric: str
    model: str
    baseline: str
    better: Literal["lower", "higher"]
    ratio: Positive


NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
)  # of a run inside another, which is a folder's

# what arithmetic and lookups raise of parts that do not go together; not what a machine raises
MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def refusals(where: str, what: str = "makes no network") -> Iterator[None]:
    """Puts the place in the config in front of what is refused inside.

    What a network's own arithmetic says of sizes that do not go together is a refusal, too.
    """
    try:
        yield
    except Refused as error:
        raise build.located(where, error) from error
    except MISFITS as error:
        raise Refused(f"{where} {what}: {one_line(error, 200)}") from error


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config's objects. Nothing is allocated before `warm_starts`."""

    config: ConfigDict
    workdir: Path
    devices: Any = None  # to plan for; None: those that there are
    where: str = "config"  # how messages name this config; that of a run inside: config.runs.NAME

    @functools.cached_property
    def settings(self) -> build.Run:
        return build.run_settings(self.config, self.where)

    @functools.cached_property
    def method(self) -> Method:
        return stopping(self._built("method", Method), lambda: self.data)

    @functools.cached_property
    def data(self) -> Dataset:
        data = self._built("data", Dataset)
        records.local(data.path, f"{self.where}.data.path")
        return data

    @functools.cached_property
    def evaluation(self) -> Evaluation | None:
        return self._built("evaluation", Evaluation) if self._group("evaluation") else None

    def _group(self, name: str) -> ConfigDict:
        """A part of the config that holds names and values. Raises Refused where it is missing or
        none.
        """
        if name not in self.config:
            raise Refused(f"{self.where}.{name} is missing")
        part = self.config[name]
        if not isinstance(part, ConfigDict):
            raise Refused(
                f"{self.where}.{name}={shown(part)}: expected a group of names and values"
            )
        return part

    def _built(self, name: str, kind: type) -> Any:
        found = build.build(self._group(name), f"{self.where}.{name}")
        if not isinstance(found, kind):
            raise Refused(
                f"{self.where}.{name}.name={self.config[name].name!r}: expected a {kind.__name__}"
            )
        return found

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        mesh = sharding.make_mesh(self.settings.mesh, self.devices)
        sharding.check_batch(
            mesh, self.settings.rules, self.data.batch_size, self.settings.accumulate
        )
        return mesh

    @functools.cached_property
    def roles(self) -> dict[str, build.Role]:
        """Every role of the method. Raises Refused where the config names another."""
        with refusals(f"{self.where}.method", "names no roles"):
            wanted = [*self.method.frozen, *self.method.inits]
        given = self._group("roles")
        for name in given:
            if name not in wanted:
                raise Refused(
                    f"{self.where}.roles.{name}: {self.config.method.name} has no such"
                    f" role{nearest(name, wanted)}"
                )
        roles = {name: self._role(name) if name in given else build.Role() for name in wanted}
        for name, role in roles.items():
            records.local(role.init, f"{self._of(name)}.init")
            if name not in self.method.frozen and (role.quantize or role.place == "host"):
                frozen = ", ".join(self.method.frozen)
                raise Refused(
                    f"{self._of(name)}: quantize and place are for frozen roles ({frozen})"
                )
        return roles

    def _role(self, name: str) -> build.Role:
        role = build.build(self.config.roles[name], self._of(name))
        if not isinstance(role, build.Role):
            raise Refused(
                f"{self._of(name)}.name={self.config.roles[name].name!r}: expected core.build:Role"
            )
        if role.model is not None and not callable(role.model):
            raise Refused(
                f"{self._of(name)}.model={shown(role.model)}: expected a model (a dataclass of"
                " sizes)"
            )
        if role.denoiser is not None and not isinstance(role.denoiser, Denoiser):
            raise Refused(
                f"{self._of(name)}.denoiser={shown(role.denoiser)}: expected"
                " diffusion.denoiser:Denoiser"
            )
        if not callable(getattr(role.ema, "decay", None)):
            raise Refused(
                f"{self._of(name)}.ema={shown(role.ema)}: expected an average, such as"
                " core.optim:Ema"
            )
        return role

    def _of(self, role: str) -> str:
        return f"{self.where}.roles.{role}"

    def source(self, role: str) -> str:
        """Where the role's first weights come from: the config's `init`, or else the method's."""
        return self.roles[role].init or self.method.inits.get(role) or "fresh"

    @functools.cached_property
    def nets(self) -> dict[str, Net]:
        """role -> network. Raises Refused where a role's model, source or adapters make none."""
        for role in self.roles:
            self._check_chain(role)
        return {role: self._net(role) for role in self.roles}

    def _check_chain(self, role: str) -> None:
        """Raises Refused where a role starts from itself."""
        seen = [role]
        while (source := self.source(seen[-1])) in self.roles:
            if source in seen:
                raise Refused(
                    f"{self._of(role)}.init: {' <- '.join([*seen, source])}, expected weights at"
                    " the end"
                )
            seen.append(source)

    def _net(self, role: str) -> Net:
        cfg = self.roles[role]
        process = getattr(self.method, "process", None)
        if cfg.init == "exact":
            if not isinstance(self.data, HasExactTeacher):
                raise Refused(
                    f"{self._of(role)}.init=exact: {self.config.data.name} knows no exact law"
                )
            return self.data.net(process) if process is not None else self.data.net()
        if cfg.lora.rank:
            given = {k: getattr(cfg.lora, k) for k in ("base", "rank", "alpha", "targets")}
            with refusals(self._of(role)):
                base = lora.base_of(role, cfg.lora.base, self.roles)
                return lora.adapt(self._net(base), **given)
        model, denoiser = self.described(role)
        wrap = {}
        if denoiser is not None and process is not None:
            wrap = {"wrap": functools.partial(denoiser.wrap, process=process)}
        with refusals(f"{self._of(role)}.model"):
            net = make_net(model, config=model, **wrap)
        net = bank(net, cfg.bank) if cfg.bank else net
        with refusals(self._of(role)):
            return quantized(net, cfg.quantize) if cfg.quantize else net

    def described(self, role: str) -> tuple[Any, Any]:
        """(model, denoiser) of a role; what is empty is that of the role or run that it starts
        from.
        """
        cfg = self.roles[role]
        source = self.source(role)
        model = cfg.model
        denoiser = cfg.denoiser
        if model is None or denoiser is None:
            other = self._described_at(role, source)
            model = model or other[0]
            denoiser = denoiser or other[1]
        if model is None:
            raise Refused(f"{self._of(role)}.model is empty, and {source!r} has none to take over")
        return model, denoiser

    def _described_at(self, role: str, source: str) -> tuple[Any, Any]:
        """(model, denoiser) of what a role starts from."""
        if source in self.roles and self.roles[source].init != "exact":
            return self.described(source)
        if source in ("fresh", "random", "exact") or source in self.roles:
            return None, None
        if (run := self.run_at(role, source)) is not None:
            return run.described("student")
        if os.path.exists(Path(source) / "config.json"):
            return interop.describe(source), None
        raise self.unknown(role, source)

    def unknown(self, role: str, source: str) -> Refused:
        """The refusal of a source that is no role, run or folder."""
        names = [
            *(name for name in self.roles if name != role),
            *(f"@{name}" for name in self.inner),
        ]
        near = nearest(source, names) if difflib.get_close_matches(source, names, 1) else ""
        return Refused(f"{self._of(role)}.init={shown(source)}: no such role, run or folder{near}")

    def run_at(self, role: str, source: str) -> Experiment | None:
        """The run that `source` names: one inside this config ("@name") or a folder; None where it
        is neither.
        """
        if source.startswith("@"):
            if source[1:] not in self.inner:
                where = f"{self._of(role)}.init={source!r}"
                raise Refused(
                    f"{where}: config.runs has no {source[1:]!r}{nearest(source[1:], self.inner)}"
                )
            return self.inner[source[1:]]
        path = Path(source) / "config.json"
        if not os.path.exists(path) or not os.path.exists(
            Path(source) / "stages"
        ):  # False for a name that is too long, too
            return None
        return Experiment(records.read_config(Path(source)), Path(source), where=str(path))

    @functools.cached_property
    def inner(self) -> dict[str, Experiment]:
        """Every run inside this one, needed or not, by name."""
        runs = self._group("runs")
        made = {}
        for name, config in runs.items():
            where = f"{self.where}.runs.{name}"
            if not NAME.fullmatch(name) or name in records.RESERVED:
                raise Refused(
                    f"{self.where}.runs has {shown(name)}: expected a plain name of a folder that"
                    " no run uses itself"
                )
            if not isinstance(config, ConfigDict):
                raise Refused(f"{where}={shown(config)}: expected a config")
            made[name] = Experiment(config, self.workdir / name, self.devices, where)
        return made

    @functools.cached_property
    def claim(self) -> Claim | None:
        """What the evaluation is held against; None where the config claims nothing."""
        given = self._group("claim")
        if not given:
            return None
        return build.made(Claim, "claim", dict(given.items()), f"{self.where}.claim")

    @functools.cached_property
    def runs(self) -> dict[str, ConfigDict]:
        """The runs inside this one that are needed: a role starts from them, or the claim names
        them.
        """
        named = {self.source(role)[1:] for role in self.roles if self.source(role).startswith("@")}
        if self.claim is not None:
            claimed = {name.split("@")[0] for name in (self.claim.model, self.claim.baseline)}
            named |= claimed - self.roles.keys()  # "teacher@1" is a row of the role teacher
        return {name: run.config for name, run in self.inner.items() if name in named}

    @functools.cached_property
    def inits(self) -> dict[str, str | None]:
        """Trained role -> role that it is copied from, or None."""
        return {
            role: self.source(role) if self.source(role) in self.roles else None
            for role in self.method.inits
        }

    @functools.cached_property
    def null_labels(self) -> dict[str, int]:
        """Role -> the label that stands for none, of the networks that take labels."""
        found = {role: getattr(net.config, "null_label", None) for role, net in self.nets.items()}
        return {role: label for role, label in found.items() if label is not None}

    def conditioned(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of numpy arrays whose null label is that of the networks, whatever the data set's
        number of classes.

        Conditions that are no labels stay as they are.
        """
        label = next(iter(self.null_labels.values()), None)
        null = batch.get("null_cond")
        if (
            label is None
            or not isinstance(null, np.ndarray)
            or not np.issubdtype(null.dtype, np.integer)
        ):
            return batch
        return {**batch, "null_cond": np.full_like(null, label)}

    def put_batch(self) -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
        """A function from this process's rows of a batch (numpy) to global arrays on the mesh,
        under the networks' null label.
        """
        put = sharding.put_batch(self.mesh, self.settings.rules)
        return lambda batch: put(self.conditioned(batch))

    def abstract(self, net: Net, role: str) -> Params:
        """ShapeDtypeStructs of `net`'s weights as the role's first ones, with dtype, sharding and
        memory that the config gives it.
        """
        cfg = self.roles[role]
        dtype = cfg.param_dtype if role in self.method.frozen else "float32"
        return abstract_params(self.mesh, cfg.rules, net, dtype, cfg.place)

    def warm_starts(self, roles: Collection[str] | None = None) -> dict[str, Params]:
        """role -> weights for every frozen role and every role whose `init` names a place; sharded
        as they arrive.

        `roles`: those whose weights are read; None: all.
        """
        starts = {
            role: self._load(role)
            for role in self.roles
            if role in self.method.frozen or self.roles[role].init
            if roles is None or role in roles
        }
        return {role: params for role, params in starts.items() if params is not None}

    def with_bases(self, roles: Iterable[str]) -> set[str]:
        """`roles`, and the roles whose weights their adapters go on."""
        found = set(roles)
        return found | {self.nets[role].adapts for role in found if self.nets[role].adapts}

    def _load(self, role: str) -> Params | None:
        net = self.nets[role]
        source = self.source(role)
        if source == "exact" or not net.shapes:
            return {}
        if source == "fresh":
            if role in self.method.frozen:
                raise Refused(
                    f"{self._of(role)}.init is empty: a frozen role needs weights (a run, a"
                    " folder, @run, exact or random)"
                )
            return None
        if source in self.roles:
            return None
        net = net.source
        abstract = self.abstract(net, role)
        if source == "random":
            key = named_key(jax.random.key(self.settings.seed), role)
            draw = lambda: jax.tree.map(lambda w, s: w.astype(s.dtype), net.init(key), abstract)
            return jax.jit(draw, out_shardings=jax.tree.map(lambda s: s.sharding, abstract))()
        if source.startswith("@"):
            return load_result(self.workdir / source[1:], abstract)
        if (Path(source) / "stages").exists():
            return load_result(Path(source), abstract)
        return interop.load_into(source, net, abstract)


@dataclasses.dataclass
class Trained:
    """A finished run: networks and weights by role (averaged where a role has an average)."""

    experiment: Experiment
    nets: dict[str, Net]
    params: dict[str, Params]

    def bound(self):
        """Networks with their weights bound, as losses see them."""
        return bind(self.nets, self.params)


def stopping(method: Method, data: Callable[[], Any]) -> Method:
    """Methods that write text and name no token that ends it, also those inside others: they stop
    at the data's, where it has one.
    """
    new: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method) and (inner := stopping(value, data)) is not value:
            new[field.name] = inner
    if getattr(method, "eos", None) == ():
        eos, pad = text_end(data())
        if eos:
            new |= {"eos": eos, "pad": pad}
    return dataclasses.replace(method, **new) if new else method


def abstract_params(mesh, rules, net: Net, dtype: str = "float32", place: str = "device") -> Params:
    """ShapeDtypeStructs with shardings for a net's weights; floating ones in `dtype`."""
    placed = sharding.in_memory(
        place, sharding.fits(sharding.param_shardings(mesh, rules, net.axes), net.shapes), net.axes
    )
    kind = lambda s: jnp.dtype(dtype) if jnp.issubdtype(s.dtype, jnp.floating) else s.dtype
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, kind(s), sharding=where), net.shapes, placed
    )


def load_result(workdir: Path, abstract: Params, role: str = "student") -> Params:
    """A finished run's weights of one role (averaged where it has an average)."""
    stages = records.stages(workdir)
    if not stages:
        raise Refused(f"{workdir}: no finished run there (no stages/)")
    return load_params(stages[-1], {role: abstract})[role]
