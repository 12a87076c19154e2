"""Fields of small networks under the names of earlier versions."""

import pytest

from jaxdistill.core.build import current

OLD = {
    "discriminator": ("models.heads:Discriminator", "features", "taps"),
    "sam": ("models.vision.sam:SamVision", "whole", "global_layers"),
    "edm": ("models.denoisers.edm:SongUNet", "waves", "time_embedding"),
}


@pytest.mark.parametrize("case", OLD)
def test_a_renamed_field_is_read_under_its_old_name(case):
    name, old, new = OLD[case]
    assert current({"name": name, old: 3}) == {"name": name, new: 3}
