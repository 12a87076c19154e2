"""The objects of a config: method, data, networks, shardings, and each role's first weights."""

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
from jaxdistill.core.types import (
    Method,
    Params,
    Refused,
    named_key,
    nearest,
    one_line,
)
from jaxdistill.data.abilities import HasExactTeacher, text_end
from jaxdistill.data.base import Dataset
from jaxdistill.diffusion.denoiser import Denoiser
from jaxdistill.evals.base import Evaluation
from jaxdistill.run import records
from jaxdistill.run.checkpoint import load_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's statement that the final evaluation of a run is compared to.

    value <= ratio * value of the baseline where lower is better, >= where higher is.
    """

    metric: str
    model: str  # a row of the table of results: "name" or "name@nfe"
    baseline: str  # another row
    better: Literal["lower", "higher"]
    ratio: Positive


# The name of a run inside another, which is also the name of its folder.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# Exceptions of networks, data and methods that do not fit each other; failures of the machine are
# others.
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
    """Puts `where`, a key of the config, in front of refusals; makes refusals of MISFITS.

    `what` comes between `where` and the text of such an exception.
    """
    try:
        yield
    except Refused as error:
        raise build.located(where, error) from error
    except MISFITS as error:
        raise Refused(f"{where} {what}: {one_line(error, 200)}") from error


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The objects of a config. Weights are allocated by `warm_starts` only."""

    config: ConfigDict
    workdir: Path
    devices: Any = None  # devices to plan for; None: the devices of this machine
    where: str = "config"  # name of this config in messages; "config.runs.NAME" for a run inside

    @functools.cached_property
    def settings(self) -> build.Run:
        return build.run_settings(self.config, self.where)

    @functools.cached_property
    def method(self) -> Method:
        """The method, with the fields that a calibration of this run has measured."""
        method = stopping(self._built("method", Method), lambda: self.data)
        return records.with_measured(self.workdir, method)

    def with_method(self, method: Method) -> Experiment:
        """This experiment with another method for the same roles and data."""
        other = dataclasses.replace(self)
        other.__dict__.update(self.__dict__)
        other.__dict__["method"] = method
        return other

    @functools.cached_property
    def data(self) -> Dataset:
        data = self._built("data", Dataset)
        records.local(data.path, f"{self.where}.data.path")
        return data

    @functools.cached_property
    def evaluation(self) -> Evaluation | None:
        return (
            self._built("evaluation", Evaluation)
            if self._group("evaluation")
            else None
        )

    def _group(self, name: str) -> ConfigDict:
        """A part of the config that is a mapping. Raises Refused where there is no such part."""
        if name not in self.config:
            raise Refused(f"{self.where}.{name} is missing")
        part = self.config[name]
        if not isinstance(part, ConfigDict):
            raise Refused(
                f"{self.where}.{name}={shown(part)}: expected a group of names and values"
            )
        return part

    def _built(self, name: str, kind: type) -> Any:
        """The object of a part of the config. Raises Refused where it is not of type `kind`."""
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
            mesh,
            self.settings.rules,
            self.data.batch_size,
            self.settings.accumulate,
        )
        return mesh

    @functools.cached_property
    def roles(self) -> dict[str, build.Role]:
        """The settings of each role of the method.

        Raises:
            Refused: The config names a role that the method does not have, or gives a trained role
                a setting for frozen ones.
        """
        with refusals(f"{self.where}.method", "names no roles"):
            wanted = [*self.method.frozen, *self.method.inits]
        given = self._group("roles")
        for name in given:
            if name not in wanted:
                raise Refused(
                    f"{self.where}.roles.{name}: {self.config.method.name} has no such"
                    f" role{nearest(name, wanted)}"
                )
        roles = {
            name: self._role(name) if name in given else build.Role()
            for name in wanted
        }
        for name, role in roles.items():
            key = self._key(name)
            records.local(role.init, f"{key}.init")
            if name not in self.method.frozen and (
                role.quantize or role.place == "host"
            ):
                frozen = ", ".join(self.method.frozen)
                raise Refused(
                    f"{key}: quantize and place are for frozen roles ({frozen})"
                )
        return roles

    def _role(self, name: str) -> build.Role:
        """The settings of a role in the config. Raises Refused where they are of other types."""
        key = self._key(name)
        given = self.config.roles[name]
        role = build.build(given, key)
        if not isinstance(role, build.Role):
            raise Refused(f"{key}.name={given.name!r}: expected core.build:Role")
        if role.model is not None and not callable(role.model):
            raise Refused(
                f"{key}.model={shown(role.model)}: expected a model (a dataclass of sizes)"
            )
        if role.denoiser is not None and not isinstance(role.denoiser, Denoiser):
            raise Refused(
                f"{key}.denoiser={shown(role.denoiser)}: expected diffusion.denoiser:Denoiser"
            )
        if not callable(getattr(role.ema, "decay", None)):
            raise Refused(
                f"{key}.ema={shown(role.ema)}: expected an average, such as core.optim:Ema"
            )
        return role

    def _key(self, role: str) -> str:
        """The config's key of a role, for messages."""
        return f"{self.where}.roles.{role}"

    def source(self, role: str) -> str:
        """The source of a role's first weights: `init` in the config, or else that of the method.

        A role, "@" and the name of a run inside, a folder, "fresh", "random" or "exact".
        """
        return self.roles[role].init or self.method.inits.get(role) or "fresh"

    @functools.cached_property
    def nets(self) -> dict[str, Net]:
        """Role -> network.

        Raises:
            Refused: The model, source or adapters of a role are unknown or do not fit.
        """
        for role in self.roles:
            self._check_chain(role)
        return {role: self._net(role) for role in self.roles}

    def _check_chain(self, role: str) -> None:
        """Raises Refused where a role starts from itself."""
        seen = [role]
        source = self.source(role)
        while source in self.roles:
            if source in seen:
                chain = " <- ".join([*seen, source])
                raise Refused(
                    f"{self._key(role)}.init: {chain}, expected weights at the end"
                )
            seen.append(source)
            source = self.source(source)

    def _net(self, role: str) -> Net:
        cfg = self.roles[role]
        key = self._key(role)
        process = getattr(self.method, "process", None)
        if cfg.init == "exact":
            if not isinstance(self.data, HasExactTeacher):
                raise Refused(
                    f"{key}.init=exact: {self.config.data.name} knows no exact law"
                )
            return (
                self.data.net(process) if process is not None else self.data.net()
            )
        if cfg.lora.adapts:
            return self._adapter(role)
        net = self._described_net(role)
        if cfg.bank:
            net = bank(net, cfg.bank)
        with refusals(key):
            return quantized(net, cfg.quantize) if cfg.quantize else net

    def _adapter(self, role: str) -> Net:
        """The network of a role with adapters or whole leaves on the weights of another."""
        cfg = self.roles[role]
        given = {
            f.name: getattr(cfg.lora, f.name) for f in dataclasses.fields(cfg.lora)
        }
        has_own = cfg.model is not None or cfg.denoiser is not None
        with refusals(self._key(role)):
            base = lora.base_of(role, cfg.lora.base, self.roles)
            own = self._described_net(role) if has_own else None
            return lora.adapt(self._net(base), own=own, **given)

    def _described_net(self, role: str) -> Net:
        """The network of a role's model and denoiser."""
        process = getattr(self.method, "process", None)
        model, denoiser = self.described(role)
        wrap = {}
        if denoiser is not None and process is not None:
            wrap = {"wrap": functools.partial(denoiser.wrap, process=process)}
        with refusals(f"{self._key(role)}.model"):
            return make_net(model, config=model, **wrap)

    def described(self, role: str) -> tuple[Any, Any]:
        """(model, denoiser) of a role: its own, or else those of its base or source."""
        cfg = self.roles[role]
        source = cfg.lora.base if cfg.lora.adapts else self.source(role)
        model = cfg.model
        denoiser = cfg.denoiser
        if model is None or denoiser is None:
            source_model, source_denoiser = self._described_source(role, source)
            model = model or source_model
            denoiser = denoiser or source_denoiser
        if model is None:
            raise Refused(
                f"{self._key(role)}.model is empty, and {source!r} has none to take over"
            )
        return model, denoiser

    def _described_source(self, role: str, source: str) -> tuple[Any, Any]:
        """(model, denoiser) of the source of a role's weights; None for what it does not have."""
        if source in self.roles and self.roles[source].init != "exact":
            return self.described(source)
        if source in ("fresh", "random", "exact") or source in self.roles:
            return None, None
        run = self.run_at(role, source)
        if run is not None:
            return run.described("student")
        if os.path.exists(Path(source) / "config.json"):
            return interop.describe(source), None
        raise self.unknown(role, source)

    def unknown(self, role: str, source: str) -> Refused:
        """The exception for a source that is no role, run or folder."""
        names = [name for name in self.roles if name != role]
        names += [f"@{name}" for name in self.inner]
        near = (
            nearest(source, names)
            if difflib.get_close_matches(source, names, 1)
            else ""
        )
        return Refused(
            f"{self._key(role)}.init={shown(source)}: no such role, run or folder{near}"
        )

    def run_at(self, role: str, source: str) -> Experiment | None:
        """The run that a source names, by "@name" or by its folder; None where it names no run."""
        if source.startswith("@"):
            name = source[1:]
            if name not in self.inner:
                raise Refused(
                    f"{self._key(role)}.init={source!r}: config.runs has no"
                    f" {name!r}{nearest(name, self.inner)}"
                )
            return self.inner[name]
        folder = Path(source)
        file = folder / "config.json"
        # os.path.exists is False for names that are too long, too; Path.exists raises.
        if not os.path.exists(file) or not os.path.exists(folder / "stages"):
            return None
        return Experiment(records.read_config(folder), folder, where=str(file))

    @functools.cached_property
    def inner(self) -> dict[str, Experiment]:
        """Name -> run, of all runs inside this one, also of those that are not needed."""
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
            made[name] = Experiment(
                config, self.workdir / name, self.devices, where
            )
        return made

    @functools.cached_property
    def claim(self) -> Claim | None:
        """The claim that the evaluation tests; None where the config has none."""
        given = self._group("claim")
        if not given:
            return None
        return build.made(
            Claim, "claim", dict(given.items()), f"{self.where}.claim"
        )

    @functools.cached_property
    def runs(self) -> dict[str, ConfigDict]:
        """Name -> config of the needed runs inside this one: sources of roles or in the claim."""
        sources = [self.source(role) for role in self.roles]
        named = {source[1:] for source in sources if source.startswith("@")}
        if self.claim is not None:
            claimed = {
                name.split("@")[0]
                for name in (self.claim.model, self.claim.baseline)
            }
            # "teacher@1" is a row of the role teacher
            named |= claimed - self.roles.keys()
        return {
            name: run.config for name, run in self.inner.items() if name in named
        }

    @functools.cached_property
    def inits(self) -> dict[str, str | None]:
        """Trained role -> the role that it is copied from; None where its source is no role."""
        sources = {role: self.source(role) for role in self.method.inits}
        return {
            role: source if source in self.roles else None
            for role, source in sources.items()
        }

    def inits_of(self, method: Method) -> dict[str, str | None]:
        """Trained role of a stage's method -> the role that it starts from, or None."""
        return {r: self.inits.get(r, source) for r, source in method.inits.items()}

    @functools.cached_property
    def null_labels(self) -> dict[str, int]:
        """Role -> the label for no condition, of the networks that take labels."""
        found = {
            role: getattr(net.config, "null_label", None)
            for role, net in self.nets.items()
        }
        return {role: label for role, label in found.items() if label is not None}

    def conditioned(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch of numpy arrays with the null label of the networks in place of the data set's.

        Networks may have more classes than the data set. Conditions that are not labels stay.
        """
        label = next(iter(self.null_labels.values()), None)
        null = batch.get("null_cond")
        has_labels = isinstance(null, np.ndarray) and np.issubdtype(
            null.dtype, np.integer
        )
        if label is None or not has_labels:
            return batch
        return {**batch, "null_cond": np.full_like(null, label)}

    def put_batch(self) -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
        """A function from this process's samples of a batch (numpy) to global arrays on the mesh.

        It makes the batch `conditioned`.
        """
        put = sharding.put_batch(self.mesh, self.settings.rules)
        return lambda batch: put(self.conditioned(batch))

    def abstract(self, net: Net, role: str) -> Params:
        """ShapeDtypeStructs of the weights of `net`, with a role's dtype, sharding and memory."""
        cfg = self.roles[role]
        dtype = cfg.param_dtype if role in self.method.frozen else "float32"
        return abstract_params(self.mesh, cfg.rules, net, dtype, cfg.place)

    def warm_starts(
        self, roles: Collection[str] | None = None
    ) -> dict[str, Params]:
        """Role -> sharded weights, of frozen roles and of those whose `init` in the config names
        a run or folder.

        Args:
            roles: The roles whose weights are read; None for all.
        """
        starts = {}
        for role, cfg in self.roles.items():
            wanted = roles is None or role in roles
            if wanted and (cfg.init or role in self.method.frozen):
                params = self._load(role)
                if params is not None:
                    starts[role] = params
        return starts

    def with_bases(self, roles: Iterable[str]) -> set[str]:
        """`roles` with the bases of those that have adapters, and the bases of these."""
        found = set(roles)
        for role in tuple(found):
            base = self.nets[role].adapts
            if base:
                found |= self.with_bases([base])
        return found

    def _load(self, role: str) -> Params | None:
        """The first weights of a role; None where it is fresh or copied from another role."""
        net = self.nets[role]
        source = self.source(role)
        if source == "exact" or not net.shapes:
            return {}
        if source == "fresh":
            if role in self.method.frozen:
                raise Refused(
                    f"{self._key(role)}.init is empty: a frozen role needs weights (a run, a"
                    " folder, @run, exact or random)"
                )
            return None
        if source in self.roles:
            return None
        net = net.source
        abstract = self.abstract(net, role)
        if source == "random":
            key = named_key(jax.random.key(self.settings.seed), role)
            return _drawn(net, key, abstract)
        if source.startswith("@"):
            return load_result(self.workdir / source[1:], abstract)
        if (Path(source) / "stages").exists():
            return load_result(Path(source), abstract)
        return interop.load_into(source, net, abstract)


def _drawn(net: Net, key: jax.Array, abstract: Params) -> Params:
    """Random weights of `net`, with the dtypes and shardings of `abstract`."""

    def draw() -> Params:
        return jax.tree.map(lambda w, s: w.astype(s.dtype), net.init(key), abstract)

    return jax.jit(
        draw, out_shardings=jax.tree.map(lambda s: s.sharding, abstract)
    )()


@dataclasses.dataclass
class Trained:
    """Networks and weights by role; the weights are averaged where a role has an average."""

    experiment: Experiment
    nets: dict[str, Net]
    params: dict[str, Params]
    # folder of a run -> weight of its adapters, where the weights have a weighted sum of them
    adapters: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def bound(self):
        """Networks with their weights bound, as losses see them."""
        return bind(self.nets, self.params)


def stopping(method: Method, data: Callable[[], Any]) -> Method:
    """`method` with the data set's end-of-text token where it generates text and names none.

    The same holds for methods inside it. It stays as it is where the data set has no such token.
    """
    new: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Method):
            inner = stopping(value, data)
            if inner is not value:
                new[field.name] = inner
    if getattr(method, "eos", None) == ():
        eos, pad = text_end(data())
        if eos:
            new |= {"eos": eos, "pad": pad}
    return dataclasses.replace(method, **new) if new else method


def abstract_params(
    mesh, rules, net: Net, dtype: str = "float32", place: str = "device"
) -> Params:
    """ShapeDtypeStructs with shardings for a net's weights; floating ones in `dtype`."""
    shardings = sharding.param_shardings(mesh, rules, net.axes)
    shardings = sharding.fits(shardings, net.shapes)
    shardings = sharding.in_memory(place, shardings, net.axes)

    def described(weight: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        is_floating = jnp.issubdtype(weight.dtype, jnp.floating)
        kind = jnp.dtype(dtype) if is_floating else weight.dtype
        return jax.ShapeDtypeStruct(weight.shape, kind, sharding=where)

    return jax.tree.map(described, net.shapes, shardings)


def load_result(workdir: Path, abstract: Params, role: str = "student") -> Params:
    """The weights of one role after the last stage, averaged where it has an average."""
    stages = records.stages(workdir)
    if not stages:
        raise Refused(f"{workdir}: no finished run there (no stages/)")
    return load_params(stages[-1], {role: abstract})[role]
