"""One table per model family of the keys of its config.json, read in both directions.

A table is a tuple of keys in the order in which they are written:

- `Field`: a field of our dataclass, with a conversion each way where the two differ. `same`,
  `optional`, `listed` and `named` make the usual ones.
- `Fixed`: a key with the one value that our model can do.
- `Implied`: a key whose value follows from our fields, and is checked against them.
- `Written`: a key that is written for PyTorch and is not read by the table.
- `Read`: a key that is read and not written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxdistill.core.types import Refused, lookup, quoted
from jaxdistill.models.layers import ACTIVATIONS

REFUSED = object()  # the default of a key that may not be missing, or not be null
OMITTED = object()  # what a key's `write` returns where the key is left out


@dataclasses.dataclass(frozen=True)
class Config:
    """A config.json while it is read."""

    values: Mapping[str, Any]
    file: Path

    def __getitem__(self, key: str) -> Any:
        """The key's value. Raises Refused where it is missing or null."""
        return setting(self.values, key, self.file)

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def refusal(self, key: str, expected: str) -> Refused:
        """The exception for a key whose value our model cannot do."""
        value = quoted(self.values[key])
        return Refused(
            f"{self.file}: {key}={value} is not supported, expected {expected}"
        )


def _as_it_is(value: Any, config: Config) -> Any:
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Field:
    """A field of our dataclass of sizes and the key that holds it.

    `read` takes the key's value and the config.json that it stands in; `write` takes our dataclass.
    """

    field: str
    key: str
    read: Callable[[Any, Config], Any] = _as_it_is
    write: Callable[[Any], Any] | None = None  # None: the field as it is
    missing: Any = REFUSED  # the value that a missing key stands for
    null: Any = REFUSED  # the value that null stands for

    def found(self, config: Config) -> Any:
        """Our value of the field. Raises Refused where the key has none that we support."""
        value = config.get(self.key)
        if value is None:
            value = self.null if self.key in config.values else self.missing
        if value is REFUSED:
            value = config[self.key]
        return self.read(value, config)

    def written(self, ours: Any) -> Any:
        """The key's value for our dataclass."""
        return getattr(ours, self.field) if self.write is None else self.write(ours)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A key with the one value that our model can do, which is also that of a missing key."""

    key: str
    value: Any
    is_written: bool = True

    def written(self, ours: Any) -> Any:
        return self.value if self.is_written else OMITTED


@dataclasses.dataclass(frozen=True)
class Implied:
    """A key whose value follows from our fields, which is also that of a missing key."""

    key: str
    written: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Written:
    """A key that is written for PyTorch: a value, or a function of our dataclass."""

    key: str
    value: Any

    def written(self, ours: Any) -> Any:
        return self.value(ours) if callable(self.value) else self.value


@dataclasses.dataclass(frozen=True)
class Read:
    """A field of ours from the whole config.json, which is not written under a key of its own.

    With an empty `field` the function only checks.
    """

    field: str
    read: Callable[[Config], Any]


Key = Field | Fixed | Implied | Written | Read


def same(field: str, key: str, missing: Any = REFUSED) -> Field:
    """A field that has the key's value."""
    return Field(field=field, key=key, missing=missing)


def optional(field: str, key: str, none: Any = 0) -> Field:
    """A field that is `none` where the key is missing or null, and is then written as null."""

    def read(value: Any, config: Config) -> Any:
        return none if value == none else value  # of the type of `none`

    def write(ours: Any) -> Any:
        value = getattr(ours, field)
        return None if value == none else value

    return Field(
        field=field, key=key, read=read, write=write, missing=none, null=none
    )


def listed(field: str, key: str, missing: Any = REFUSED) -> Field:
    """A tuple of ours that is a list in JSON."""
    return Field(
        field=field,
        key=key,
        read=lambda value, config: tuple(value),
        write=lambda ours: list(getattr(ours, field)),
        missing=missing,
    )


def named(
    field: str, key: str, names: Mapping[str, Any], missing: Any = REFUSED
) -> Field:
    """A field whose values have names in PyTorch; of several names the first is written."""

    def read(value: str, config: Config) -> Any:
        return lookup(names, value, f"{config.file}: {key}")

    def write(ours: Any) -> str:
        value = getattr(ours, field)
        return next(
            (name for name, meaning in names.items() if meaning == value), value
        )

    return Field(field=field, key=key, read=read, write=write, missing=missing)


def one_of(
    field: str, key: str, values: Mapping[Any, Any], missing: Any = REFUSED
) -> Field:
    """A field with a few values, {in PyTorch: in ours}; a refusal lists them."""

    def read(value: Any, config: Config) -> Any:
        if value not in values:
            raise config.refusal(key, " or ".join(map(repr, values)))
        return values[value]

    null = None if None in values else REFUSED
    pair = named(field, key, values)
    return Field(
        field=field,
        key=key,
        read=read,
        write=pair.write,
        missing=missing,
        null=null,
    )


def activation(key: str) -> Field:
    """The field `activation`, a name of `layers.ACTIVATIONS`."""
    return named("activation", key, {name: name for name in ACTIVATIONS})


def token(field: str, key: str, missing: Any = REFUSED) -> Field:
    """The id of a special token; -1 in ours and null in JSON stand for none."""

    def write(ours: Any) -> int | None:
        value = getattr(ours, field)
        return None if value < 0 else value

    return Field(field=field, key=key, write=write, missing=missing, null=-1)


def tokens(field: str, key: str, missing: Any = REFUSED) -> Field:
    """Ids of special tokens, a tuple; in JSON a list of several, one number, or null for none."""

    def read(value: Any, config: Config) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, list) else (value,)

    def write(ours: Any) -> Any:
        ids = getattr(ours, field)
        if not ids:
            return None
        return list(ids) if len(ids) > 1 else ids[0]

    return Field(
        field=field, key=key, read=read, write=write, missing=missing, null=[]
    )


def labels() -> tuple[Field, Written]:
    """The number of classes; they are called LABEL_0, LABEL_1, ..., since ours have no names."""

    def by_number(ours: Any) -> dict[str, str]:
        return {str(i): f"LABEL_{i}" for i in range(ours.classes)}

    def by_name(ours: Any) -> dict[str, int]:
        return {f"LABEL_{i}": i for i in range(ours.classes)}

    classes = Field(
        field="classes",
        key="id2label",
        read=lambda names, config: len(names),
        write=by_number,
        missing={"0": "", "1": ""},
    )
    return classes, Written("label2id", by_name)


def always(values: Mapping[str, Any]) -> tuple[Fixed, ...]:
    """Keys of one value each."""
    return tuple(Fixed(key, value) for key, value in values.items())


def read_keys(
    keys: Iterable[Key], config: Mapping[str, Any], file: Path
) -> dict[str, Any]:
    """Our fields from config.json.

    Raises Refused where a key is missing, or has a value that is not supported.
    """
    given = Config(config, file)
    for key in keys:
        if isinstance(key, Fixed):
            check_value(config, key.key, key.value, file)
    found = {}
    for key in keys:
        if isinstance(key, Field):
            found[key.field] = key.found(given)
        if isinstance(key, Read):
            value = key.read(given)
            if key.field:
                found[key.field] = value
    return found


def check_implied(
    keys: Iterable[Key], ours: Any, config: Mapping[str, Any], file: Path
) -> None:
    """Raises Refused where a key of config.json differs from what our fields imply."""
    for key in keys:
        if isinstance(key, Implied):
            check_value(config, key.key, key.written(ours), file)


def write_keys(keys: Iterable[Key], ours: Any) -> dict[str, Any]:
    """The keys of config.json for our dataclass, in the order of the table."""
    values = {
        key.key: key.written(ours) for key in keys if not isinstance(key, Read)
    }
    return {key: value for key, value in values.items() if value is not OMITTED}


def check_value(
    config: Mapping[str, Any], key: str, value: Any, file: Path
) -> None:
    """Raises Refused where config.json has another value than `value`; a missing key has it."""
    if config.get(key, value) != value:
        raise Config(config, file).refusal(key, repr(value))


def setting(config: Mapping[str, Any], key: str, file: Path) -> Any:
    """config[key]. Raises Refused where it is missing or null."""
    if config.get(key) is None:
        raise Refused(f"{file}: {key} is {'null' if key in config else 'missing'}")
    return config[key]
