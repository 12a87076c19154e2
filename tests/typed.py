"""Shapes in the signatures of public functions, as in `Float[Array, "B D"]`, are checked while the
tests run.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

PACKAGES = (  # whose annotations are checked at every call
    "jaxdistill.diffusion",
    "jaxdistill.evals",
    "jaxdistill.models",
    "jaxdistill.objectives",
    "jaxdistill.samplers",
    "jaxdistill.surgery",
)

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def checked(function):
    """Adds the checks, but to constructors: core/fields.py checks fields, and JSON holds lists."""
    return function if function.__name__ == "__init__" else _checked(function)


def install() -> None:
    """Installs the checks; has to be called before the library is imported for the first time."""
    install_import_hook(list(PACKAGES), "tests.typed.checked")
