"""The stage of a run follows from the kind of its settings."""

from pathflip_jax.settings.kinds import KINDS
from pathflip_jax.training import stages


def test_every_kind_of_settings_has_a_stage_that_gets_them_with_the_run_that_resumes(monkeypatch):
    assert stages.STAGES.keys() == set(KINDS)
    for kind in KINDS:
        monkeypatch.setitem(stages.STAGES, kind, lambda *given: given)
        assert stages.open_training(kind(), "mesh", {"data": {}}) == (kind(), "mesh", {"data": {}})
