"""What a config stands for: method, data, networks, shardings and where every role's first weights come from."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxdistill import interop
from jaxdistill.core import build, lora, sharding
from jaxdistill.core.bank import bank
from jaxdistill.core.checkpoint import load_params
from jaxdistill.core.net import Net, make_net
from jaxdistill.core.storage import quantized
from jaxdistill.core.types import Method, Params, Refused, named_key, nearest


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config's objects. Nothing is allocated before `warm_starts`."""

    config: ConfigDict
    workdir: Path
    devices: Any = None  # to plan for; None: those that there are

    @functools.cached_property
    def settings(self) -> build.Run:
        return build.run_settings(self.config)

    @functools.cached_property
    def method(self) -> Method:
        return stopping(build.build(self.config.method), lambda: self.data)

    @functools.cached_property
    def data(self) -> Any:
        return build.build(self.config.data)

    @functools.cached_property
    def evaluation(self) -> Any:
        return build.build(self.config.evaluation) if self.config.evaluation else None

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        mesh = sharding.make_mesh(self.settings.mesh, self.devices)
        sharding.check_batch(mesh, self.settings.rules, self.data.batch_size, self.settings.accumulate)
        return mesh

    @functools.cached_property
    def roles(self) -> dict[str, build.Role]:
        """Every role of the method. Raises Refused where the config names another."""
        wanted = [*self.method.frozen, *self.method.inits]
        for name in self.config.roles:
            if name not in wanted:
                raise Refused(f"config.roles.{name}: {self.config.method.name} has no such role{nearest(name, wanted)}")
        roles = {name: build.build(self.config.roles[name]) if name in self.config.roles else build.Role() for name in wanted}
        for name, role in roles.items():
            if role.place not in ("device", "host"):
                raise Refused(f"config.roles.{name}.place={role.place!r}: expected 'device' or 'host'")
            if name not in self.method.frozen and (role.quantize or role.place == "host"):
                raise Refused(f"config.roles.{name}: quantize and place are for frozen roles ({', '.join(self.method.frozen)})")
        return roles

    def source(self, role: str) -> str:
        """Where the role's first weights come from: the config's `init`, or what the method says."""
        return self.roles[role].init or self.method.inits.get(role) or "fresh"

    @functools.cached_property
    def nets(self) -> dict[str, Net]:
        return {role: self._net(role) for role in self.roles}

    def _net(self, role: str) -> Net:
        cfg, process = self.roles[role], getattr(self.method, "process", None)
        if cfg.init == "exact":
            if not hasattr(self.data, "net"):
                raise Refused(f"config.roles.{role}.init=exact: {self.config.data.name} knows no exact law")
            return self.data.net(process) if process is not None else self.data.net()
        if cfg.lora.rank:
            fields = {k: getattr(cfg.lora, k) for k in ("base", "rank", "alpha", "targets")}
            return lora.adapt(self._net(cfg.lora.base), **fields)
        model, denoiser = self.described(role)
        wrap = {"wrap": functools.partial(denoiser.wrap, process=process)} if denoiser is not None and process is not None else {}
        net = make_net(model, config=model, **wrap)
        net = bank(net, cfg.bank) if cfg.bank else net
        return quantized(net, cfg.quantize) if cfg.quantize else net

    def described(self, role: str) -> tuple[Any, Any]:
        """(model, denoiser) of a role; what is empty is that of the role or run that it starts from."""
        cfg, source = self.roles[role], self.source(role)
        model, denoiser = cfg.model, cfg.denoiser
        if model is None or denoiser is None:
            if source in self.roles and self.roles[source].init != "exact":
                other = self.described(source)
            elif (run := self._run(source)) is not None:
                other = run.described("student")
            elif (Path(source) / "config.json").exists():
                other = (interop.describe(source), None)
            elif source in ("fresh", "random", "exact") or source in self.roles:
                other = (None, None)
            else:
                raise Refused(f"config.roles.{role}.init={source!r}: no such role, run or folder")
            model, denoiser = model or other[0], denoiser or other[1]
        if model is None:
            raise Refused(f"config.roles.{role}.model is empty, and {source!r} has none to take over")
        return model, denoiser

    def _run(self, source: str) -> Experiment | None:
        """The run that `source` names: one inside this config ("@name") or a folder; None where it is neither."""
        if source.startswith("@"):
            if source[1:] not in self.config.runs:
                raise Refused(f"init={source!r}: config.runs has no {source[1:]!r}{nearest(source[1:], self.config.runs)}")
            return Experiment(self.config.runs[source[1:]], self.workdir / source[1:])
        path = Path(source) / "config.json"
        if not path.exists() or not (Path(source) / "stages").exists():
            return None
        return Experiment(ConfigDict(json.loads(path.read_text())), Path(source))

    @functools.cached_property
    def runs(self) -> dict[str, ConfigDict]:
        """The runs inside this one that are needed: a role starts from them, or the claim names them."""
        named = {self.source(role)[1:] for role in self.roles if self.source(role).startswith("@")}
        claimed = {self.config.claim[key].split("@")[0] for key in ("model", "baseline") if self.config.claim}
        named |= claimed - self.roles.keys()  # "teacher@1" is a row of the role teacher
        return {name: inner for name, inner in self.config.runs.items() if name in named}

    @functools.cached_property
    def inits(self) -> dict[str, str | None]:
        """Trained role -> role that it is copied from, or None."""
        return {role: self.source(role) if self.source(role) in self.roles else None for role in self.method.inits}

    def abstract(self, net: Net, role: str) -> Params:
        """ShapeDtypeStructs of `net`'s weights as the role's first ones, with dtype, sharding and memory that the config gives it."""
        cfg = self.roles[role]
        dtype = cfg.param_dtype if role in self.method.frozen else "float32"
        return abstract_params(self.mesh, cfg.rules, net, dtype, cfg.place)

    def warm_starts(self) -> dict[str, Params]:
        """role -> weights for every frozen role and every role whose `init` names a place; sharded as they arrive."""
        starts = {role: self._load(role) for role in self.roles if role in self.method.frozen or self.roles[role].init}
        return {role: params for role, params in starts.items() if params is not None}

    def _load(self, role: str) -> Params | None:
        net, source = self.nets[role], self.source(role)
        if source == "exact" or not net.shapes:
            return {}
        if source == "fresh":
            if role in self.method.frozen:
                raise Refused(f"config.roles.{role}.init is empty: a frozen role needs weights (a run, a folder, @run, exact or random)")
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


def stopping(method: Method, data: Callable[[], Any]) -> Method:
    """Methods that write text and name no token that ends it, also those inside others: they stop at the data's, where it has one."""
    new: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method) and (inner := stopping(value, data)) is not value:
            new[field.name] = inner
    if getattr(method, "eos", None) == () and hasattr(data(), "eos"):
        end = data().eos
        new |= {"eos": tuple(end) if isinstance(end, (tuple, list)) else (end,), "pad": data().pad}
    return dataclasses.replace(method, **new) if new else method


def abstract_params(mesh, rules, net: Net, dtype: str = "float32", place: str = "device") -> Params:
    """ShapeDtypeStructs with shardings for a net's weights; floating ones in `dtype`."""
    placed = sharding.resting_in(place, sharding.fits(sharding.param_shardings(mesh, rules, net.axes), net.shapes), net.axes)
    kind = lambda s: jnp.dtype(dtype) if jnp.issubdtype(s.dtype, jnp.floating) else s.dtype
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, kind(s), sharding=where), net.shapes, placed)


def load_result(workdir: Path, abstract: Params, role: str = "student") -> Params:
    """A finished run's weights of one role (averaged where it has an average)."""
    stages = sorted((workdir / "stages").glob("[0-9]*"), key=lambda p: int(p.name))
    if not stages:
        raise Refused(f"{workdir}: no finished run there (no stages/)")
    return load_params(stages[-1], {role: abstract})[role]
