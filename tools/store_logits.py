"""Stores a teacher's most likely next tokens on a data set, so that students train without it.

python tools/store_logits.py --config=FILE --out=FOLDER [--teacher=DIR] [--top_k=64] \\
    [--temperature=1.0] [--dtype=float16]
    [--splits=train,test] [--rows=0] [--test_rows=0] [--file_batches=16] [--workdir=DIR]
    [--config.data.path=... ...]

The data set is the config's, read in batches of data.batch_size. The teacher is a finished run's
student or an exported folder (--teacher), or the config's own role `teacher` (--workdir for one
that a run inside has trained). --rows and --test_rows are numbers of samples, from the first (0:
all; endless data sets need both). For each position the top_k most likely tokens, their
log-probabilities and the log of the other tokens' probability are stored, as float16, bfloat16 or
float32, with the data set's own arrays.

After a killed call the same command goes on: existing files are complete and stay, one that was
being written is removed. data.logits:StoredLogits reads the store, and
methods.language.kd:StoredKD trains on it.
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
    """A method without trained roles."""

    inits = {}
    ema = ()


@dataclasses.dataclass(frozen=True)
class Reader(Experiment):
    """The data and the teacher of a config, without its method and other roles."""

    teacher: str = ""

    @functools.cached_property
    def method(self):
        return Reading()

    @functools.cached_property
    def roles(self):
        given = self.config.roles.get("teacher")
        role = build.build(given) if given else build.Role()
        if self.teacher:
            role = dataclasses.replace(
                role, init=self.teacher, model=None, denoiser=None
            )
        if role.init in ("", "fresh"):
            raise Refused(
                "--teacher=DIR is needed: the config has no teacher with weights"
            )
        return {"teacher": role}


def rows_of(data, split: str, most: int):
    """The first `most` samples of a split (0: all), as a sequence.

    Raises:
        Refused: The data set is endless, and `most` is 0.
    """
    if type(data).examples is not Dataset.examples:
        samples = data.examples(split)
        return Derived(
            range(min(most or len(samples), len(samples))), samples.__getitem__
        )
    if not most:
        data.examples(split)  # raises Refused
    if split == "test":
        held_out = data.evaluation(most)
        return Derived(
            range(most), lambda i: {k: v[i] for k, v in held_out.items()}
        )

    @functools.lru_cache(2)
    def batch(i: int):
        return data.batch(i, slice(None))

    def sample(i: int):
        number, place = divmod(i, data.batch_size)
        return {k: v[place] for k, v in batch(number).items()}

    return Derived(range(most), sample)


def difference(before, now, name: str = "") -> str:
    """The first difference of two nested dicts, as a part of a sentence; "" where there is none."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return "" if before == now else f"{name} is {before!r} there, {now!r} here"
    for key in sorted(before.keys() | now.keys()):
        found = difference(
            before.get(key), now.get(key), f"{name}.{key}" if name else key
        )
        if found:
            return found
    return ""


def prepare(folder: Path, about: dict) -> None:
    """Writes the description of a store to its folder, and removes half-written files.

    Raises:
        Refused: The folder has another store, or other files.
    """
    if folder.is_file():
        raise Refused(f"--out={folder}: is a file")
    before = read_about(folder)
    now = json.loads(json.dumps(about))
    if before is None and folder.exists() and any(folder.iterdir()):
        raise Refused(
            f"--out={folder}: not empty and no store; give another folder"
        )
    changed = "" if before is None else difference(before, now)
    if changed:
        raise Refused(
            f"--out={folder} holds another store: {changed}; give another folder"
        )
    write_json(folder / ABOUT, now)
    for half in folder.glob(".*.arrayrecord.*"):
        half.unlink()


KNOWN = {
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


def store(argv):
    values, config = arguments(argv, KNOWN)
    if not values["out"]:
        raise Refused("--out=FOLDER is needed")
    config, workdir = needed(
        {**values, "workdir": values["workdir"] or values["out"]}, config
    )
    top_k = whole(values, "top_k", 1)
    group = whole(values, "file_batches", 1)
    most = {
        "train": whole(values, "rows", 0),
        "test": whole(values, "test_rows", 0),
    }
    dtype = lookup(DTYPES, values["dtype"], "--dtype")
    temperature = decimal(values, "temperature", 0.0, above=True)
    out = output(values, "out", folder=True)
    reader = Reader(config, workdir, teacher=values["teacher"])
    source = reader.roles["teacher"].init
    if source.startswith("@") and not values["workdir"]:
        raise Refused(
            f"--workdir=DIR is needed: the teacher is the run {source} inside one"
        )
    net = reader.nets["teacher"]
    data = reader.data
    size = reader.data.batch_size
    splits = {}
    for split in values["splits"].split(","):
        splits[split] = rows_of(data, split, lookup(most, split, "--splits"))
    for split, rows in splits.items():
        if not len(rows):
            raise Refused(
                f"data: no rows in {split}; expected some, or --splits without it"
            )
    first = next(iter(splits.values()))[0]
    if not {"tokens", "mask"} <= first.keys():
        raise Refused(
            f"data: {type(data).__name__} has {', '.join(first)}, expected text (tokens and mask)"
        )

    def read(params, batch):
        logits = net.apply(params, batch["tokens"], **context(batch))
        ids, log_probs, log_tail = topk_log_probs(
            logits, top_k, temperature=temperature
        )
        return {
            "teacher_ids": ids,
            "teacher_log_probs": log_probs.astype(dtype),
            "teacher_log_tail": log_tail.astype(dtype),
        }

    def logits_of(params, batch):
        return net.apply(params, batch["tokens"], **context(batch))

    with sharding.use(reader.mesh, reader.settings.rules):
        spec = {}
        for key, value in first.items():
            spec[key] = jax.ShapeDtypeStruct(
                (size, *np.shape(value)), np.asarray(value).dtype
            )
        # raises what does not fit before anything is read
        jax.eval_shape(read, net.shapes, spec)
        logits = jax.eval_shape(logits_of, net.shapes, spec)
        about = {
            "teacher": values["teacher"]
            or f"{values['config'] or workdir} ({source})",
            "data": json.loads(config.data.to_json()),
            "top_k": top_k,
            "temperature": temperature,
            "dtype": values["dtype"],
            "vocab": logits.shape[-1],
            "rows": {split: len(rows) for split, rows in splits.items()},
            "files": {
                split: -(-len(rows) // (size * group))
                for split, rows in splits.items()
            },
        }
        params = reader.warm_starts()["teacher"]
        prepare(out, about)
        write(reader, jax.jit(read), params, splits, out, size, group)


def write(
    reader: Reader, read, params, splits, folder: Path, size: int, group: int
) -> None:
    """Makes the missing files, each of `group` batches of `size` samples."""
    put = sharding.put_batch(reader.mesh, reader.settings.rules)
    started = time.perf_counter()
    files = []
    for split, rows in splits.items():
        for i, low in enumerate(range(0, len(rows), size * group)):
            high = min(low + size * group, len(rows))
            files.append((store_file(folder, split, i), rows, low, high))
    missing = [f for f in files if not f[0].exists()]
    total = sum(map(len, splits.values()))
    tokens = 0
    todo = sum(high - low for _, _, low, high in missing)

    def batches(rows, low: int, high: int):
        """(samples, their top-k arrays on the device) of each batch.

        The last batch is padded with its last sample. The device computes a batch while the one
        before is written.
        """
        before = None
        for start in range(low, high, size):
            samples = [rows[i] for i in range(start, min(start + size, high))]
            padded = samples + samples[-1:] * (size - len(samples))
            batch = {
                k: np.stack([sample[k] for sample in padded]) for k in samples[0]
            }
            found = read(params, put(batch))
            if before is not None:
                yield before
            before = samples, found
        yield before

    def records(rows, low: int, high: int):
        """The samples with their top-k arrays, one by one."""
        nonlocal tokens
        for samples, found in batches(rows, low, high):
            found = sharding.local_samples(found)
            for i, sample in enumerate(samples):
                yield {**sample, **{k: v[i] for k, v in found.items()}}
            tokens += sum(len(sample["tokens"]) for sample in samples)
            bar.update(len(samples))

    with metrics.bar(range(total), "store logits", "row", done=total - todo) as bar:
        for file, rows, low, high in missing:
            arrayrecord.write(file, records(rows, low, high))
    seconds = time.perf_counter() - started
    megabytes = sum(file.stat().st_size for file, *_ in files) / 1e6
    print(
        f"{folder}: {total:,} rows, {megabytes:,.1f} MB; {tokens:,} tokens in {seconds:,.1f} s,"
        f" {tokens / seconds:,.0f} a second"
    )


if __name__ == "__main__":
    main(store)
