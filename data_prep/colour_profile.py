"""Conversion of pixels to sRGB by the ICC profile of their slide."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms

_CURE = "leave out --icc, or leave the slide out"


class ToSrgb:
    """Conversion by a profile, in the profile's own rendering intent. Raises ValueError for one that is not of RGB."""

    def __init__(self, path: Path, profile: bytes) -> None:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = own.profile.xcolor_space.strip()
            if space == "RGB":
                intent = ImageCms.Intent(ImageCms.getDefaultIntent(own))
                srgb = ImageCms.createProfile("sRGB")
                self._transform = ImageCms.buildTransform(own, srgb, "RGB", "RGB", intent)
        except (OSError, ValueError, ImageCms.PyCMSError) as error:
            raise ValueError(
                f"{path}: its ICC colour profile of {len(profile)} bytes is damaged ({error}); {_CURE}"
            ) from None
        if space != "RGB":
            raise ValueError(f"{path}: its ICC colour profile is of {space} colours, expected RGB; {_CURE}")

    def __call__(self, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels in sRGB."""
        return np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), self._transform))
