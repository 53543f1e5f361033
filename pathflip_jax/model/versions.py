"""Settings added since earlier versions, and the values that reproduce the behaviour of those versions."""

from collections.abc import Iterable
from typing import Any

from pathflip_jax.settings.fields import CURRENT_VALUE
from pathflip_jax.settings.kinds import LEGACY_VALUES


class UnknownSettings(ValueError):
    """Settings that no version up to this one knows, listed in `names`."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def before(section: str, names: Iterable[str]) -> dict[str, Any]:
    """Values of these settings that reproduce versions without them; settings without effect are omitted."""
    stated = ((name, LEGACY_VALUES.get(f"{section}.{name}", CURRENT_VALUE)) for name in names)
    return {name: value for name, value in stated if value is not CURRENT_VALUE}
