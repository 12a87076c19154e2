"""Checks of a run before its first step and before anything is written."""

from __future__ import annotations

import fnmatch
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core import sharding
from jaxdistill.core.bank import Bank
from jaxdistill.core.build import located
from jaxdistill.core.needs import check_condition, check_needs, condition_of
from jaxdistill.core.net import Net
from jaxdistill.core.step import results
from jaxdistill.core.types import Refused, nearest, one_line
from jaxdistill.diffusion.process import Pred
from jaxdistill.evals.base import Table
from jaxdistill.evals.samples import SampleEval
from jaxdistill.run.experiment import MISFITS, Experiment, Trained
from jaxdistill.run.programs import abstract_stages


def check(experiment: Experiment) -> None:
    """Builds and traces this run and the needed runs inside it, without weights.

    Raises:
        Refused: A value is of another type or out of range; a source does not exist; data,
            networks, method and evaluation do not fit each other; or the claim names a row or
            metric that the evaluation does not have. The message names the config's key.
    """
    _check(experiment, set())


def _check(experiment: Experiment, seen: set[str]) -> None:
    """`check`, tracing only one of several runs with equal configs; `seen` has their JSON."""
    check_values(experiment)
    own = experiment.config.to_json(sort_keys=True)
    if own in seen:
        return
    seen.add(own)
    for name in experiment.runs:
        _check(experiment.inner[name], seen)
    with sharding.use(experiment.mesh, experiment.settings.rules):
        _check_calls(experiment)
        _check_programs(experiment)


def check_values(experiment: Experiment) -> None:
    """The checks of this run that need no trace: values, sources, sizes, claim.

    Properties of `experiment` raise Refused when they are first read.
    """
    _ = experiment.settings
    _ = experiment.nets
    _ = experiment.evaluation
    _ = experiment.runs
    for role in experiment.method.inits:
        _check_optimizer(experiment, role)
    _check_data(experiment)
    _ = experiment.mesh
    _check_labels(experiment)
    _check_vocabularies(experiment)
    _check_sources(experiment)
    _check_claim(experiment)


def _check_optimizer(experiment: Experiment, role: str) -> None:
    """The optimiser's settings make one."""
    try:
        experiment.roles[role].optimizer.make(1)
    except Refused as error:
        raise located(
            f"{experiment.where}.roles.{role}.optimizer", error
        ) from error


def _check_data(experiment: Experiment) -> None:
    """The data set has samples, and what method and evaluation need of them."""
    where = f"{experiment.where}.data"
    try:
        experiment.data.check(test=experiment.evaluation is not None)
        experiment.data.check_method(experiment.method)
        given = experiment.data.spec()
    except Refused as error:
        raise located(where, error) from error
    except MISFITS as error:
        raise Refused(
            f"{where} ({experiment.config.data.name}) makes no samples: {_reason(error)}"
        ) from error
    method = experiment.method
    check_needs(given, method.needs, type(method).__name__, where)
    if experiment.evaluation is None:
        return
    try:
        experiment.evaluation.check(experiment.data)
    except Refused as error:
        raise located(f"{experiment.where}.evaluation", error) from error


def _check_labels(experiment: Experiment) -> None:
    """All networks with labels have the same number of classes, and the data has no more."""
    where = experiment.where
    sizes = experiment.null_labels
    first = next(iter(sizes), "")
    for role, size in sizes.items():
        if size != sizes[first]:
            raise Refused(
                f"{where}.roles.{role}.model.classes={size}: {where}.roles.{first} "
                f"has {sizes[first]}, expected one number of classes for all networks"
            )
    count = experiment.data.label_count
    if count is None:
        count = _null_label(experiment.data.one_sample())
    for role, size in sizes.items():
        if count is not None and count > size:
            raise Refused(
                f"{where}.data has labels 0 to {count - 1}, "
                f"{where}.roles.{role}.model.classes={size}: expected at least {count}"
            )


def _null_label(sample: dict) -> int | None:
    """The null label of a sample, which follows all others; None where it has no labels."""
    null = sample.get("null_cond")
    if isinstance(null, dict) or null is None or np.ndim(null):
        return None
    return int(null) if np.issubdtype(np.asarray(null).dtype, np.integer) else None


def _check_vocabularies(experiment: Experiment) -> None:
    """The vocabulary of each network has all tokens of the data."""
    where = experiment.where
    data = experiment.data
    for role, net in experiment.nets.items():
        vocab = getattr(net.config, "vocab", None)
        size = data.vocab_size if role == "student" else data.teacher_vocab_size
        if vocab is not None and size is not None and vocab < size:
            raise Refused(
                f"{where}.data has {size} tokens, {where}.roles.{role}: "
                f"a vocabulary of {vocab}, expected at least {size}"
            )


def _check_sources(experiment: Experiment) -> None:
    """The sources of all roles exist, and each frozen role with weights has a source."""
    for role in experiment.roles:
        source = experiment.source(role)
        known = source in ("fresh", "random", "exact") or source in experiment.roles
        if (
            not known
            and experiment.run_at(role, source) is None
            and not os.path.isdir(source)
        ):
            raise experiment.unknown(role, source)
        is_frozen = role in experiment.method.frozen
        if source == "fresh" and is_frozen and experiment.nets[role].shapes:
            raise Refused(
                f"{experiment.where}.roles.{role}.init is empty: a frozen role needs weights (a"
                " run, a folder, @run, exact or random)"
            )


def _check_calls(experiment: Experiment) -> None:
    """Each denoiser takes the samples and conditions of the data; predictions have their shape."""
    batch = experiment.data.spec()
    if "x" not in batch:
        return
    data = f"{experiment.where}.data"
    t = jax.ShapeDtypeStruct(batch["x"].shape[:1], jnp.float32)
    for role, net in experiment.nets.items():
        cfg = experiment.roles[role]
        is_base = net.adapts and cfg.model is None  # which is checked itself
        if cfg.init == "exact" or is_base or experiment.described(role)[1] is None:
            continue
        net = net.whole if net.adapts else net
        where = f"{experiment.where}.roles.{role}"
        who = f"{where} ({_name(net)})"
        check_condition(
            batch.get("cond"), condition_of(net.config), who, f"{data}: cond"
        )
        member = net.one if isinstance(net, Bank) else net
        with _fitting(f"{who} does not take {data} ({_shapes(batch)})"):
            pred = jax.eval_shape(
                member.apply, member.shapes, batch["x"], t, batch.get("cond")
            )
        _check_size(where, net, experiment.where, batch["x"].shape[1:-1])
        if isinstance(pred, Pred) and pred.x0.shape != batch["x"].shape:
            raise Refused(
                f"{who} answers {list(pred.x0.shape)} to {data}.x"
                f" {list(batch['x'].shape)}, expected the same shape"
            )


def _check_size(where: str, net: Net, config: str, grid: tuple[int, ...]) -> None:
    """The size of a network for square samples is that of the data.

    Such a network takes samples of other sizes, too, with interpolated positions.
    """
    size = getattr(net.config, "size", None)
    if isinstance(size, int) and len(grid) >= 2 and size not in grid[-2:]:
        shape = " x ".join(map(str, grid))
        raise Refused(
            f"{where}.model.size={size}: {config}.data.x is {shape}, expected {max(grid[-2:])}"
        )


def _check_programs(experiment: Experiment) -> None:
    """The train steps of all stages, and the samplers of the evaluation, can be traced."""
    method = experiment.config.method.name
    nets = experiment.nets
    params = {}
    networks = ", ".join(f"{role} {_name(net)}" for role, net in nets.items())
    what = (
        f"{experiment.where}.method ({method}) does not run on {_shapes(experiment.data.spec())}"
        f" with {networks}"
    )
    with _fitting(what):
        for programs, stage_nets in abstract_stages(experiment):
            nets = stage_nets
            state = programs.abstract
            params = {**params, **state.frozen, **results(state)}
    if isinstance(experiment.evaluation, SampleEval):
        _check_sampling(Trained(experiment, nets, params))


def _check_sampling(trained: Trained) -> None:
    """The samplers of the evaluation can be traced."""
    experiment = trained.experiment
    evaluation = experiment.evaluation
    batch = experiment.data.spec()
    for role, steps in evaluation.models(trained.params):
        with _fitting(
            f"{experiment.where}.evaluation: {role} cannot be sampled at {steps} steps"
        ):
            shapes = {r: trained.nets[r].shapes for r in trained.params}
            jax.eval_shape(
                evaluation.drawing(trained, role, steps),
                shapes,
                batch,
                jnp.int32(0),
            )


def _check_claim(experiment: Experiment) -> None:
    """The rows and the metric of the claim are among those of the evaluation."""
    claim = experiment.claim
    if claim is None:
        return
    where = f"{experiment.where}.claim"
    if experiment.evaluation is None:
        raise Refused(f"{where}: nothing is evaluated; expected config.evaluation")
    table = rows(experiment)
    if not table:
        return
    for key in ("model", "baseline"):
        wanted = getattr(claim, key)
        metrics = _metrics_of(table, wanted)
        if metrics is None:
            raise Refused(
                f"{where}.{key}={wanted!r}: no such row of the evaluation{nearest(wanted, table)}"
            )
        if not any(fnmatch.fnmatchcase(claim.metric, name) for name in metrics):
            raise Refused(
                f"{where}.metric={claim.metric!r}: no metric of"
                f" {wanted}{nearest(claim.metric, metrics)}"
            )


def rows(experiment: Experiment) -> Table:
    """The rows of the final table: those of the run, then the students of its baselines.

    Baselines are runs inside this one that no role starts from; their rows have the run's name.
    """
    table = dict(experiment.evaluation.table(experiment.roles, experiment.data))
    sources = {
        experiment.source(role).removeprefix("@") for role in experiment.roles
    }
    for name in experiment.runs:
        inner = experiment.inner[name]
        if name in sources or inner.evaluation is None:
            continue
        for label, metrics in inner.evaluation.table(
            inner.roles, inner.data
        ).items():
            row, _, nfe = label.partition("@")
            if row == "student":
                table[f"{name}@{nfe}"] = metrics
    return table


def _metrics_of(table: Table, wanted: str) -> tuple[str, ...] | None:
    """The metrics of the row "name@nfe", or of the first row of a name; None: no such row."""
    if "@" in wanted:
        return table.get(wanted)
    for label, metrics in table.items():
        if label.partition("@")[0] == wanted:
            return metrics
    return None


@contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Makes refusals, beginning with `what`, of exceptions while parts are traced together."""
    try:
        yield
    except Refused as error:
        if str(error).startswith("config."):
            raise
        raise Refused(f"{what}: {error}") from error
    except MISFITS as error:
        raise Refused(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An exception's type and first line, with the last place outside of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename]
    at = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {one_line(error, 200)}{at}"


def _name(net: Net) -> str:
    return type(net.config).__name__


def _shapes(batch: dict) -> str:
    """The arrays of a batch in a message: path, dtype and shape of one sample."""
    texts = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = "/".join(str(key.key) for key in path)
        texts.append(f"{name} {leaf.dtype}{list(leaf.shape[1:])}")
    return ", ".join(texts)
