"""Feature files written by the code of other tools, for `tests/data/readers/test_tools.py`; README.md has the commands.

    python make.py TOOL FOLDER [SOURCE]

SOURCE is the folder of the tool's unpacked wheel, if the tool is not installed: its writers run without its models.
Each slide has 24 tiles in a grid of 6 x 4; element j of the features of tile i is sin(i * (1 + j)).
"""

import sys
from pathlib import Path

import numpy as np

TILES, EDGE = 24, 512
CELLS = np.array([(i % 6, i // 6) for i in range(TILES)])


def features(width: int) -> np.ndarray:
    """Features [tiles, width]."""
    return np.sin(np.arange(TILES)[:, None] * (1 + np.arange(width)[None])).astype(np.float32)


def atlaspatch(folder: Path) -> None:
    """AtlasPatch 1.1.0: `H5PatchWriter.write_coords` and `append_features`, of two encoders for S1, of one for S2."""
    from atlas_patch.services.storage import H5PatchWriter

    def entries(with_patches: bool):
        for i, (x, y) in enumerate((CELLS * EDGE).tolist()):
            yield x, y, EDGE, EDGE, 0, np.full((4, 4, 3), i, np.uint8) if with_patches else None

    (folder / "patches").mkdir(parents=True, exist_ok=True)
    for slide, encoders in (("S1", {"uni_v1": 8, "conch_v15": 6}), ("S2", {"uni_v1": 8})):
        path = folder / "patches" / f"{slide}.h5"
        writer = H5PatchWriter(
            chunk_rows=16, patch_size=256, patch_size_level0=EDGE, level0_mag=40, target_mag=20,
            level0_wh=(4000, 3000), overlap=0, slide_stem=slide, wsi_path=f"slides/{slide}.svs",
            extra_file_attrs={"mpp": 0.2527, "magnification": 40, "vendor": "aperio"},
        )  # fmt: skip
        writer.write_coords(path, entries(False), batch=16)
        for encoder, width in encoders.items():
            writer.append_features(
                output_path=path, entries=entries(True), feature_name=encoder, feature_batch=16, expected_total=TILES,
                feature_fn=lambda batch, width=width: features(width)[[patch[0, 0, 0] for patch in batch]],
                feature_attrs={"embedding_dim": width},
            )  # fmt: skip


if __name__ == "__main__":
    tool, folder, *source = sys.argv[1:]
    sys.path[:0] = source
    {"atlaspatch": atlaspatch}[tool](Path(folder))
