"""What wraps a host says everything that it does not override as the host does, whatever `Method`
comes to have.
"""

import pytest

from jaxdistill.core.types import Method
from jaxdistill.methods._hosted import Delegating, Hosted
from jaxdistill.methods.distribution._members import Members
from jaxdistill.methods.distribution.disback import Recording
from jaxdistill.methods.distribution.embedding_loss import EmbeddingLoss
from jaxdistill.methods.distribution.multi_student import MultiStudent
from jaxdistill.objectives.partition import Consecutive

NAMES = sorted(name for name in vars(Method) if not name.startswith("_"))
Probe = type(
    "Probe",
    (Method,),
    {**{name: object() for name in NAMES}, "memory": staticmethod(dict), "process": object()},
)
PROBE = Probe()
WRAPPERS = {  # with what each overrides
    Hosted(host=PROBE): {"stages"},
    EmbeddingLoss(host=PROBE): {"stages", "turns", "memory"},
    Members(host=PROBE, partition=Consecutive(cells=1, classes=2)): {"stages", "turns"},
    Recording(host=PROBE, every=1): {"stages", "turns", "inits", "frozen", "ema"},
}


def kind(value) -> str:
    return type(value).__name__


@pytest.mark.parametrize(("wrapper", "own"), WRAPPERS.items(), ids=map(kind, WRAPPERS))
def test_every_member_of_a_method_is_the_hosts(wrapper, own):
    for name in {*NAMES, "process"} - own:
        assert getattr(wrapper, name) is getattr(PROBE, name), name
    for name in own:
        assert any(
            name in vars(cls) for cls in type(wrapper).__mro__ if cls not in (Delegating, Method)
        ), name


def test_several_hosts_share_a_sampler():
    """The last one's; roles are everyone's, and everyone checks."""
    asked = []

    class Checking(Method):
        process = "p"

        def check(self, nets, data):
            asked.append((nets, data))

    method = MultiStudent(tsm=Checking(), dm=Checking(), adm=Checking(), shares=(1.0, 1.0, 1.0))
    method.check({}, "data")
    assert asked == [({}, "data")] * 3
    own = {"check", "stages", "generator", "inits", "frozen"}
    alone = MultiStudent(tsm=PROBE, dm=PROBE, adm=PROBE, shares=(0.0, 0.0, 1.0))
    for name in {*NAMES, "process"} - own:
        assert getattr(alone, name) is getattr(PROBE, name), name


def test_a_host_refuses_what_does_not_fit():
    class Picky(Method):
        def check(self, nets, data):
            raise KeyError("asked")

    with pytest.raises(KeyError, match="asked"):
        EmbeddingLoss(host=Picky()).check({}, None)


def test_what_nobody_has_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        Hosted(host=Method()).nothing  # noqa: B018
