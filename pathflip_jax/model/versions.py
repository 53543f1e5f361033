"""Settings that earlier versions lacked, and what those versions did, as the fields of the settings say."""

from collections.abc import Iterable
from typing import Any

from pathflip_jax.settings.fields import AS_NOW
from pathflip_jax.settings.kinds import BEFORE


class UnknownSettings(ValueError):
    """Settings that no version up to this one has; `names` are those."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def before(section: str, names: Iterable[str]) -> dict[str, Any]:
    """Values that versions without these settings worked by, where stated and where they make a difference."""
    stated = ((name, BEFORE.get(f"{section}.{name}", AS_NOW)) for name in names)
    return {name: value for name, value in stated if value is not AS_NOW}
