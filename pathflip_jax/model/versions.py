"""Settings that earlier versions lacked, and the values that reproduce their behaviour, from the settings' fields."""

from collections.abc import Iterable
from typing import Any

from pathflip_jax.settings.fields import AS_NOW
from pathflip_jax.settings.kinds import LEGACY_VALUES


class UnknownSettings(ValueError):
    """Settings unknown to every version up to this one, listed in `names`."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def before(section: str, names: Iterable[str]) -> dict[str, Any]:
    """Values that reproduce versions without these settings, where stated and where they make a difference."""
    stated = ((name, LEGACY_VALUES.get(f"{section}.{name}", AS_NOW)) for name in names)
    return {name: value for name, value in stated if value is not AS_NOW}
