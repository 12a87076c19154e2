"""Shapes in the signatures of public functions, as in `Float[Array, "B D"]`, are checked while the
tests run.
"""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# whose annotations are checked at every call
PACKAGES = ("jaxdistill.evals", "jaxdistill.models", "jaxdistill.surgery")

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def install() -> None:
    """Installs the checks; has to be called before the library is imported for the first time."""
    install_import_hook(list(PACKAGES), "tests.typed.checked")
