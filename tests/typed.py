"""Typed shapes are checked while the tests run: `Float[Array, "B D"]` of public functions."""

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

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


def install() -> None:
    """To be called before the first import of the library."""
    install_import_hook(list(PACKAGES), "tests.typed.checked")
