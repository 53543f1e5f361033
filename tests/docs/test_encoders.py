"""The table of patch encoders against the registry."""

import re

import pages

from pathflip_jax.vision.recipes import RECIPES

PAGE = (pages.ROOT / "docs/encoders.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (\S+)( \(gated\))? \| (.+?) \| (\d+) px at ([\d.]+) µm \| ([\d,]+) \|", re.MULTILINE)


def test_every_registered_encoder_is_listed_with_its_facts():
    rows = {
        name: (repository, bool(gated), licence, int(size), float(mpp), int(width.replace(",", "")))
        for name, repository, gated, licence, size, mpp, width in ROW.findall(PAGE)
    }
    assert rows == {
        name: (recipe.repository, recipe.gated, recipe.licence, recipe.patch_size, recipe.mpp, recipe.width)
        for name, recipe in RECIPES.items()
    }


def test_their_number_is_that_of_the_pages():
    for page in ("docs/encoders.md", "docs/data.md", "docs/README.md", "README.md", "CHANGELOG.md"):
        (number,) = set(re.findall(r"(\d+) (?:published )?(?:patch )?encoders", (pages.ROOT / page).read_text()))
        assert int(number) == len(RECIPES), page
