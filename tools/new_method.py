"""Starts a method: its file, toy config, test and recipe, which run as they stand.

python tools/new_method.py FAMILY NAME ClassName "Title" arXiv-id

FAMILY is a folder of tools/skeletons: trajectory, distribution, language or architecture. NAME is
the module's, as in my_method, ClassName that of its class, as in MyMethod. Nothing that exists is
replaced. What has to be filled in: the paper's idea, its equations, its constants, its claim, and
the specification's checks.
"""

import contextlib
import keyword
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from jaxdistill.core.types import Refused, lookup
from launch._command import main

ROOT = Path(__file__).parents[1]
SKELETONS = {
    folder.name: folder
    for folder in sorted((ROOT / "tools/skeletons").iterdir())
    if folder.is_dir()
}
NAMES = ("FAMILY", "NAME", "ClassName", "Title", "arXiv-id")
PLACES = {  # a skeleton's file -> where it goes
    "method.py": "jaxdistill/methods/{family}/{name}.py",
    "toy.py": "configs/toy/{name}.py",
    "test.py": "tests/methods/{family}/test_{name}.py",
    "recipe.py": "configs/recipes/{name}.py",
}


def new_method(argv: list[str]) -> None:
    """Prints the files that it writes. Raises Refused before it writes any."""
    family, name, cls, title, paper = checked(argv)
    words = {"my_method": name, "MyMethod": cls, "My method": title, "2601.00000": paper}
    fill = lambda text: re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], text)
    files = {
        ROOT / place.format(family=family, name=name): fill(skeleton(family, part))
        for part, place in PLACES.items()
    }
    for path in files:
        if path.exists() or path.is_symlink():
            raise Refused(f"NAME={name}: {path.relative_to(ROOT)} exists; expected another name")
    write(files)
    for path in files:
        print(path.relative_to(ROOT))


def skeleton(family: str, part: str) -> str:
    return (SKELETONS[family] / part).read_text(encoding="utf-8")


def checked(argv: list[str]) -> list[str]:
    """The five arguments. Raises Refused."""
    flags = [word for word in argv if word.startswith("-")]
    if flags or len(argv) != len(NAMES):
        found = f"unknown argument {flags[0]}" if flags else f"found {len(argv)} arguments"
        raise Refused(
            f"{found}; expected {' '.join(NAMES)}, as in: trajectory my_method MyMethod 'My"
            " method' 2601.00000"
        )
    family, name, cls, title, paper = argv
    lookup(SKELETONS, family, "FAMILY")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,60}", name) or keyword.iskeyword(name):
        raise Refused(
            f"NAME={name[:80]!r}: expected a module's name of small letters, digits and _, as in"
            " my_method"
        )
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]{0,60}", cls) or keyword.iskeyword(cls):
        raise Refused(
            f"ClassName={cls[:80]!r}: expected a class's name of letters and digits, as in MyMethod"
        )
    if any(
        re.search(rf"\b{cls}\b", skeleton(family, part).replace("MyMethod", "")) for part in PLACES
    ):
        raise Refused(
            f"ClassName={cls}: the skeleton of {family} has something of that name; expected"
            " another"
        )
    if (
        not re.fullmatch(r"[^\\\"]{1,90}", title)
        or not title.isprintable()
        or title != title.strip()
    ):
        raise Refused(
            f"Title={title[:80]!r}: expected one line of at most 90 characters without quotation"
            " marks and backslashes"
        )
    if not re.fullmatch(r"[0-9]{4}\.[0-9]{5}", paper):
        raise Refused(f"arXiv-id={paper[:80]!r}: expected one as 2601.00000")
    return argv


def write(files: dict[Path, str]) -> None:
    """All of the files, or none. Raises Refused."""
    made: list[Path] = []
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as out:
                made.append(path)
                out.write(text)
    except OSError as error:
        for half in made:
            with contextlib.suppress(OSError):
                half.unlink()
        raise Refused(f"{path}: {error.strerror or error}") from None


if __name__ == "__main__":
    main(new_method)
