"""Reads a data set once with a teacher and stores its likeliest next tokens, so that many students
can do without it.

python tools/store_logits.py --config=FILE --out=FOLDER [--teacher=DIR] [--top_k=64] \\
    [--temperature=1.0] [--dtype=float16]
    [--splits=train,test] [--rows=0] [--test_rows=0] [--file_batches=16] [--workdir=DIR]
    [--config.data.path=... ...]

The data set is the config's, read data.batch_size rows at a time. The teacher is a finished run's
student or an exported folder (--teacher), or the config's own role `teacher` (--workdir for one
that a run inside has trained). --rows and
--test_rows: the first so many (0: all; sets without end need both). Of every position are kept the
top_k likeliest tokens, their log-probabilities and the log mass of all others, as float16, bfloat16
or float32, beside the data set's own arrays.

A killed call is run again with the same arguments: files that are there are complete and stay, a
half-written one goes. Read it with data.logits:StoredLogits, train on it with
methods.language.kd:StoredKD.
"""

import dataclasses
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.core import build, sharding
from jaxdistill.core.types import Method, Refused, lookup
from jaxdistill.data import arrayrecord
from jaxdistill.data.base import Dataset, Derived
from jaxdistill.data.logits import ABOUT, read_about, store_file
from jaxdistill.models.language.lm import context
from jaxdistill.objectives.divergence import topk_log_probs
from jaxdistill.run import metrics
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.experiment import Experiment
from launch._command import arguments, decimal, main, needed, output, whole

DTYPES = {name: jnp.dtype(name) for name in ("float16", "bfloat16", "float32")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Method):
    inits = {}
    ema = ()


@dataclasses.dataclass(frozen=True)
class Reader(Experiment):
    """A config's data and its teacher alone."""

    teacher: str = ""

    @functools.cached_property
    def method(self):
        return Reading()

    @functools.cached_property
    def roles(self):
        given = self.config.roles.get("teacher")
        role = build.build(given) if given else build.Role()
        role = (
            dataclasses.replace(role, init=self.teacher, model=None, denoiser=None)
            if self.teacher
            else role
        )
        if role.init in ("", "fresh"):
            raise Refused("--teacher=DIR is needed: the config has no teacher with weights")
        return {"teacher": role}


def rows_of(data, split: str, most: int):
    """The first `most` samples of a split (0: all), one by one. Raises Refused on a set without end
    and no `most`.
    """
    if type(data).examples is not Dataset.examples:
        every = data.examples(split)
        return Derived(range(min(most or len(every), len(every))), every.__getitem__)
    if not most:
        data.examples(split)
    if split == "test":
        held = data.evaluation(most)
        return Derived(range(most), lambda i: {k: v[i] for k, v in held.items()})
    batch = functools.lru_cache(2)(lambda i: data.batch(i, slice(None)))
    return Derived(
        range(most),
        lambda i: {k: v[i % data.batch_size] for k, v in batch(i // data.batch_size).items()},
    )


def difference(before, now, name: str = "") -> str:
    """Where two trees of dicts differ first, in words; empty where they do not."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before == now else f"{name} is {before!r} there, {now!r} here"
    found = (
        difference(before.get(k), now.get(k), f"{name}.{k}" if name else k)
        for k in sorted(before.keys() | now.keys())
    )
    return next((text for text in found if text), "")


def claim(folder: Path, about: dict) -> None:
    """Makes the folder the store of `about`. Raises Refused where it holds another, or something
    else.
    """
    if folder.is_file():
        raise Refused(f"--out={folder}: is a file")
    before = read_about(folder)
    now = json.loads(json.dumps(about))
    if before is None and folder.exists() and any(folder.iterdir()):
        raise Refused(f"--out={folder}: not empty and no store; give another folder")
    if before is not None and (changed := difference(before, now)):
        raise Refused(f"--out={folder} holds another store: {changed}; give another folder")
    write_json(folder / ABOUT, now)
    for half in folder.glob(".*.arrayrecord.*"):  # what a killed call was writing
        half.unlink()


def store(argv):
    known = {
        "config": "",
        "workdir": "",
        "teacher": "",
        "out": "",
        "top_k": "64",
        "temperature": "1.0",
        "dtype": "float16",
        "splits": "train,test",
        "rows": "0",
        "test_rows": "0",
        "file_batches": "16",
    }
    values, config = arguments(argv, known)
    if not values["out"]:
        raise Refused("--out=FOLDER is needed")
    config, workdir = needed({**values, "workdir": values["workdir"] or values["out"]}, config)
    top_k = whole(values, "top_k", 1)
    group = whole(values, "file_batches", 1)
    most = {"train": whole(values, "rows", 0), "test": whole(values, "test_rows", 0)}
    dtype = lookup(DTYPES, values["dtype"], "--dtype")
    temperature = decimal(values, "temperature", 0.0, above=True)
    out = output(values, "out", folder=True)
    reader = Reader(config, workdir, teacher=values["teacher"])
    if reader.roles["teacher"].init.startswith("@") and not values["workdir"]:
        raise Refused(
            f"--workdir=DIR is needed: the teacher is the run {reader.roles['teacher'].init}"
            " inside one"
        )
    net = reader.nets["teacher"]
    data = reader.data
    size = reader.data.batch_size
    splits = {
        split: rows_of(data, split, lookup(most, split, "--splits"))
        for split in values["splits"].split(",")
    }
    for split, rows in splits.items():
        if not len(rows):
            raise Refused(f"data: no rows in {split}; expected some, or --splits without it")
    first = next(iter(splits.values()))[0]
    if not {"tokens", "mask"} <= first.keys():
        raise Refused(
            f"data: {type(data).__name__} has {', '.join(first)}, expected text (tokens and mask)"
        )

    def read(params, batch):
        logits = net.apply(params, batch["tokens"], **context(batch))
        ids, log_probs, log_tail = topk_log_probs(logits, top_k, temperature=temperature)
        return {
            "teacher_ids": ids,
            "teacher_log_probs": log_probs.astype(dtype),
            "teacher_log_tail": log_tail.astype(dtype),
        }

    with sharding.use(reader.mesh, reader.settings.rules):
        spec = jax.tree.map(
            lambda v: jax.ShapeDtypeStruct((size, *np.shape(v)), np.asarray(v).dtype), first
        )
        logits, _ = jax.eval_shape(
            lambda p, b: (net.apply(p, b["tokens"], **context(b)), read(p, b)), net.shapes, spec
        )
        about = {
            "teacher": values["teacher"]
            or f"{values['config'] or workdir} ({reader.roles['teacher'].init})",
            "data": json.loads(config.data.to_json()),
            "top_k": top_k,
            "temperature": temperature,
            "dtype": values["dtype"],
            "vocab": logits.shape[-1],
            "rows": {split: len(rows) for split, rows in splits.items()},
            "files": {split: -(-len(rows) // (size * group)) for split, rows in splits.items()},
        }
        params = reader.warm_starts()["teacher"]
        claim(out, about)
        write(reader, jax.jit(read), params, splits, out, size, group)


def write(reader: Reader, read, params, splits, folder: Path, size: int, group: int) -> None:
    """Makes the files that are missing, of `group` batches of `size` rows each."""
    put = sharding.put_batch(reader.mesh, reader.settings.rules)
    started = time.perf_counter()
    files = [
        (store_file(folder, split, i), rows, low, min(low + size * group, len(rows)))
        for split, rows in splits.items()
        for i, low in enumerate(range(0, len(rows), size * group))
    ]
    missing = [f for f in files if not f[0].exists()]
    total = sum(map(len, splits.values()))
    tokens = 0
    todo = sum(high - low for _, _, low, high in missing)

    def laws(rows, low: int, high: int):
        """(rows, what the teacher says of them) of each batch; the last one is filled up, and the
        device runs one ahead.
        """
        before = None
        for start in range(low, high, size):
            part = [rows[i] for i in range(start, min(start + size, high))]
            filled = part + part[-1:] * (size - len(part))
            law = read(params, put({k: np.stack([row[k] for row in filled]) for k in part[0]}))
            if before is not None:
                yield before
            before = part, law
        yield before

    def told(rows, low: int, high: int):
        nonlocal tokens
        for part, law in laws(rows, low, high):
            law = sharding.local_samples(law)
            for i, row in enumerate(part):
                yield {**row, **{k: v[i] for k, v in law.items()}}
            tokens += sum(len(row["tokens"]) for row in part)
            bar.update(len(part))

    with metrics.bar(range(total), "store logits", "row", done=total - todo) as bar:
        for file, rows, low, high in missing:
            arrayrecord.write(file, told(rows, low, high))
    seconds = time.perf_counter() - started
    megabytes = sum(f.stat().st_size for f, *_ in files) / 1e6
    print(
        f"{folder}: {total:,} rows, {megabytes:,.1f} MB; {tokens:,} tokens in {seconds:,.1f} s,"
        f" {tokens / seconds:,.0f} a second"
    )


if __name__ == "__main__":
    main(store)
