"""Starts a method: its file, toy config, test and recipe, which run as they stand.

python tools/new_method.py FAMILY NAME ClassName "Title" arXiv-id

FAMILY is a folder of tools/skeletons: trajectory, distribution, language or architecture. NAME is
the name of the module, as in my_method, and ClassName that of its class, as in MyMethod. Existing
files are not replaced. To fill in: the paper's idea, equations, constants and claim, and the checks
of the specification.
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
FOLDERS = sorted(
    path for path in (ROOT / "tools/skeletons").iterdir() if path.is_dir()
)
SKELETONS = {folder.name: folder for folder in FOLDERS}
NAMES = ("FAMILY", "NAME", "ClassName", "Title", "arXiv-id")
# File of a skeleton -> the new file.
PLACES = {
    "method.py": "jaxdistill/methods/{family}/{name}.py",
    "toy.py": "configs/toy/{name}.py",
    "test.py": "tests/methods/{family}/test_{name}.py",
    "recipe.py": "configs/recipes/{name}.py",
}


def new_method(argv: list[str]) -> None:
    """Writes the files and prints their names. Raises Refused before it writes any."""
    family, name, cls, title, paper = checked(argv)
    words = {
        "my_method": name,
        "MyMethod": cls,
        "My method": title,
        "2601.00000": paper,
    }
    placeholder = re.compile("|".join(map(re.escape, words)))
    files = {}
    for part, place in PLACES.items():
        path = ROOT / place.format(family=family, name=name)
        files[path] = placeholder.sub(
            lambda found: words[found[0]], skeleton(family, part)
        )
    for path in files:
        if path.exists() or path.is_symlink():
            raise Refused(
                f"NAME={name}: {path.relative_to(ROOT)} exists; expected another name"
            )
    write(files)
    for path in files:
        print(path.relative_to(ROOT))


def skeleton(family: str, part: str) -> str:
    """The text of a file of a skeleton."""
    return (SKELETONS[family] / part).read_text(encoding="utf-8")


def checked(argv: list[str]) -> list[str]:
    """The five arguments. Raises Refused where one is missing or bad."""
    flags = [word for word in argv if word.startswith("-")]
    if flags or len(argv) != len(NAMES):
        found = (
            f"unknown argument {flags[0]}"
            if flags
            else f"found {len(argv)} arguments"
        )
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
    texts = [skeleton(family, part).replace("MyMethod", "") for part in PLACES]
    if any(re.search(rf"\b{cls}\b", text) for text in texts):
        raise Refused(
            f"ClassName={cls}: the skeleton of {family} has something of that name; expected"
            " another"
        )
    is_one_line = title.isprintable() and title == title.strip()
    if not is_one_line or not re.fullmatch(r"[^\\\"]{1,90}", title):
        raise Refused(
            f"Title={title[:80]!r}: expected one line of at most 90 characters without quotation"
            " marks and backslashes"
        )
    if not re.fullmatch(r"[0-9]{4}\.[0-9]{5}", paper):
        raise Refused(f"arXiv-id={paper[:80]!r}: expected one as 2601.00000")
    return argv


def write(files: dict[Path, str]) -> None:
    """Writes all of the files, or none. Raises Refused where one cannot be written."""
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
