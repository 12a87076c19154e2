"""Wrappers of a host: every member of `Method` that they do not override is the host's, also those
that are added to `Method` later.
"""

import pytest

from jaxdistill.core.types import Method
from jaxdistill.diffusion.process import Flow
from jaxdistill.methods._hosted import Delegating, Hosted
from jaxdistill.methods.distribution._members import Members
from jaxdistill.methods.distribution.disback import Recording
from jaxdistill.methods.distribution.dmd2 import DMD2
from jaxdistill.methods.distribution.embedding_loss import EmbeddingLoss
from jaxdistill.methods.distribution.multi_student import MultiStudent
from jaxdistill.methods.distribution.snoopi import PGSB, ClippedPGSB
from jaxdistill.methods.distribution.uni_instruct import UniInstruct
from jaxdistill.objectives.partition import Consecutive

NAMES = sorted(name for name in vars(Method) if not name.startswith("_"))
Probe = type(
    "Probe",
    (Method,),
    {
        **{name: object() for name in NAMES},
        "memory": staticmethod(dict),
        "process": object(),
    },
)
PROBE = Probe()
WRAPPERS = {  # with what each overrides
    Hosted(host=PROBE): {"stages", "settled"},
    EmbeddingLoss(host=PROBE): {"stages", "settled", "turns", "memory", "needs"},
    Members(host=PROBE, partition=Consecutive(cells=1, classes=2)): {
        "stages",
        "settled",
        "turns",
    },
    Recording(host=PROBE, every=1): {
        "stages",
        "settled",
        "turns",
        "inits",
        "frozen",
        "ema",
    },
}


def kind(value) -> str:
    return type(value).__name__


@pytest.mark.parametrize(
    ("wrapper", "own"), WRAPPERS.items(), ids=map(kind, WRAPPERS)
)
def test_every_member_of_a_method_is_the_hosts(wrapper, own):
    for name in {*NAMES, "process"} - own:
        assert getattr(wrapper, name) is getattr(PROBE, name), name
    for name in own:
        assert any(
            name in vars(cls)
            for cls in type(wrapper).__mro__
            if cls not in (Delegating, Method)
        ), name


def test_several_hosts_share_a_sampler():
    """The last one's; roles are everyone's, and everyone checks."""
    asked = []

    class Checking(Method):
        process = "p"

        def check(self, nets, data):
            asked.append((nets, data))

    method = MultiStudent(
        tsm=Checking(), dm=Checking(), adm=Checking(), shares=(1.0, 1.0, 1.0)
    )
    method.check({}, "data")
    assert asked == [({}, "data")] * 3
    own = {"check", "stages", "settled", "generator", "inits", "frozen", "needs"}
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


def test_a_settled_wrapper_wraps_the_settled_host():
    class Slow(Method):
        def settled(self):
            return PROBE

    assert EmbeddingLoss(host=Slow()).settled() == EmbeddingLoss(host=PROBE)


@pytest.mark.parametrize(
    "wrapper",
    [
        EmbeddingLoss(host=UniInstruct(critic_steps=3)),
        MultiStudent(adm=UniInstruct(critic_steps=3), shares=(0.0, 0.0, 1.0)),
    ],
    ids=kind,
)
def test_a_wrappers_first_phase_and_cycle_are_its_hosts(wrapper):
    assert wrapper.cycle == 3 and wrapper.host.critic_only == 391
    assert wrapper.settled().host == UniInstruct(critic_steps=3, critic_only=0)


def test_a_wrapper_needs_what_its_hosts_need():
    assert set(EmbeddingLoss(host=PGSB(shape=(2,))).needs) == {"x"}
    assert set(EmbeddingLoss(host=DMD2(), labelled=True).needs) == {"x", "cond"}
    assert set(MultiStudent(dm=ClippedPGSB(process=Flow())).needs) == {
        "x",
        "text_embed",
    }
