"""Pixel size of a slide in micrometres, with a check of the file's metadata.

A wrong resolution gives patches of another physical size, which no later step detects. Contradictory metadata are
therefore refused with both readings, and the user states which is right.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openslide

from pathflip_jax.data.pixels.ome import read_ome

# From beyond a 100x objective to below a 1x one; a TIFF written at 72 dpi claims 352.8.
_SANE_MPP = (0.05, 10.0)
_UM_TIMES_MAGNIFICATION = 10.0
# um per pixel times objective power. Where vendors state a nominal power, the product is 10 within a tenth, or within a
# factor of two with a doubler. Where they state the power engraved on the objective, it is the camera's pixel size in
# um, commonly 3.5 to 10.
_NOMINAL_VENDORS = ("aperio", "hamamatsu", "leica", "ventana")
_AGREES, _NOMINAL, _ENGRAVED = (7.0, 14.0), (4.5, 22.0), (2.0, 25.0)
_SCANNED = ((0.22, 0.275), (0.45, 0.55), (0.99, 1.01))  # um per pixel of scanners at 40x, 20x and 10x
_UNIT_ERRORS = (2.54, 1 / 2.54, 10.0, 0.1)  # common unit errors: inch for centimetre, millimetre for centimetre
_CURE = (
    "Give the right one in the column mpp of the slide table or, for every slide of the run, with --override-mpp "
    "(--assume-mpp only fills in what a file lacks)"
)
_UNUSED = 0.02  # an assumption that differs by less from the file's value needs no note


class Resolution(NamedTuple):
    """Micrometres per level-0 pixel, their source, and a note for the user."""

    mpp: float
    source: str
    notes: tuple[str, ...] = ()


class _Stated(NamedTuple):
    """Resolution in a file: um per pixel across and down, and their source; objective power; vendor; 0 for none."""

    across: float
    down: float
    source: str
    power: float
    vendor: str
    notes: tuple[str, ...] = ()

    @property
    def mpp(self) -> float:
        sides = self.across, self.down
        return sum(sides) / 2 if min(sides) > 0 else max(sides)


def find_resolution(
    path: Path,
    properties: Mapping[str, str],
    size: tuple[int, int],
    assume_mpp: float | None = None,
    override_mpp: float | None = None,
) -> Resolution:
    """Level-0 resolution of a slide of that size: `override_mpp`, the file's, `assume_mpp`, or the nominal one.

    Raises ValueError where it is missing, absurd or contradictory, with both readings and the cure.
    """
    for value, option in ((assume_mpp, "--assume-mpp"), (override_mpp, "--override-mpp")):
        if value is not None and not _SANE_MPP[0] <= value <= _SANE_MPP[1]:
            raise ValueError(f"{option} {value:g}: expected {_SANE_MPP[0]} to {_SANE_MPP[1]:g} um per pixel")
    stated = _read(properties, size)
    credible = _SANE_MPP[0] <= stated.mpp <= _SANE_MPP[1]
    if override_mpp is not None:
        other = _differs(override_mpp, stated.mpp)
        note = f"{override_mpp:g} um per pixel as given, although {stated.source} says {stated.mpp:.4g}"
        return Resolution(override_mpp, "as given", (note,) if other else ())
    if credible:
        notes = stated.notes + _check(path, stated)
        if assume_mpp is not None and _differs(assume_mpp, stated.mpp):
            notes += (f"--assume-mpp {assume_mpp:g} not used: {stated.source} says {stated.mpp:.4g} um per pixel",)
        return Resolution(stated.mpp, stated.source, notes)
    if assume_mpp is not None:
        return Resolution(assume_mpp, "--assume-mpp")
    if stated.power > 0 and not stated.mpp:
        return Resolution(_UM_TIMES_MAGNIFICATION / stated.power, f"the nominal size at {stated.power:g}x")
    found = f"claims {stated.mpp:.4g} um per pixel" if stated.mpp else "says neither um per pixel nor objective power"
    raise ValueError(
        f"{path}: {found}, expected {_SANE_MPP[0]} to {_SANE_MPP[1]:g}; give its resolution, for example "
        "`--assume-mpp 0.25` for a 40x scan"
    )


def _read(properties: Mapping[str, str], size: tuple[int, int]) -> _Stated:
    def number(name: str) -> float:
        try:
            value = float(properties.get(name, 0))
        except ValueError:
            return 0.0
        return value if np.isfinite(value) and value > 0 else 0.0

    vendor = properties.get(openslide.PROPERTY_NAME_VENDOR, "")
    across, down = number(openslide.PROPERTY_NAME_MPP_X), number(openslide.PROPERTY_NAME_MPP_Y)
    source = "its resolution tag" if vendor == "generic-tiff" else "its header"
    stated = _Stated(across, down, source, number(openslide.PROPERTY_NAME_OBJECTIVE_POWER), vendor)
    ome = read_ome(properties.get("tiff.ImageDescription", ""), *size)
    if ome is None:
        return stated
    if not max(ome.across, ome.down):
        return stated._replace(power=stated.power or ome.power)
    found = _Stated(ome.across, ome.down, "its OME-XML", stated.power or ome.power, "OME")
    if _SANE_MPP[0] <= stated.mpp <= _SANE_MPP[1] and _differs(stated.mpp, found.mpp):
        note = f"{found.mpp:.4g} um per pixel as its OME-XML says; its resolution tag says {stated.mpp:.4g}"
        found = found._replace(notes=(note,))
    return found


def _check(path: Path, stated: _Stated) -> tuple[str, ...]:
    """Note on the physical size stated in the file. Raises ValueError where the file contradicts itself."""
    if min(stated.across, stated.down) > 0 and max(stated.across, stated.down) > 1.1 * min(stated.across, stated.down):
        raise ValueError(
            f"{path}: pixels of {stated.across:g} x {stated.down:g} um, expected square pixels; scan or convert it "
            "again"
        )
    mpp = stated.mpp
    if stated.power:
        nominal, product = _UM_TIMES_MAGNIFICATION / stated.power, mpp * stated.power
        power = f"about {nominal:.4g} by its objective power of {stated.power:g}x"
        both = f"{mpp:.4g} um per pixel by {stated.source}, {power}"
        low, high = _NOMINAL if stated.vendor in _NOMINAL_VENDORS else _ENGRAVED
        if not low <= product <= high:
            raise ValueError(f"{path}: its metadata give two contradictory resolutions: {both}. {_CURE}")
        if stated.vendor in _NOMINAL_VENDORS and not _AGREES[0] <= product <= _AGREES[1]:
            return (f"{both}; the first is used (pass --override-mpp to change it)",)
        return ()
    if stated.source != "its resolution tag" or _is_of_scanner(mpp):
        return ()
    meant = [f"{mpp / factor:.4g}" for factor in _UNIT_ERRORS if _is_of_scanner(mpp / factor)]
    if meant:
        raise ValueError(
            f"{path}: its resolution tag says {mpp:.4g} um per pixel, which no scanner has; it would be "
            f"{' or '.join(meant)} if the program that wrote the tag confused units (a factor of 2.54 or 10). {_CURE}"
        )
    return ()


def _is_of_scanner(mpp: float) -> bool:
    return any(low <= mpp <= high for low, high in _SCANNED)


def _differs(one: float, other: float) -> bool:
    return other > 0 and abs(one / other - 1) > _UNUSED
