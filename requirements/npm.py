"""Download the viewer page's files from npm, by version and hash: `python requirements/npm.py` (needs npm).

The files are committed, so that neither an installation nor a browser needs npm or a CDN. Run this after changing
the version below, and commit the files that it writes.
"""

import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "pathflip_jax/viewer/page"
PACKAGE = "openseadragon@6.1.1"
INTEGRITY = "sha512-g4iKe2q8B642SaBT3+x4ZF3/8b1TxPPydyjmtrOLgDrlYWMKd9ZXM+1Cb/xa9DVySkvs/7l6HR1nHKfD5F3Tsw=="
# File of the package: its name in the page folder. The tests check the SHA-256 of each file there.
FILES = {
    "package/build/openseadragon/openseadragon.min.js": "openseadragon.min.js",
    "package/LICENSE.txt": "LICENSE.openseadragon.txt",
}
HASHES = {
    "openseadragon.min.js": "4e6fe442742db946dfbe1e748486552078e28ba617412e91b81146443465d2c4",
    "LICENSE.openseadragon.txt": "17da96b26ac706d2cbd06d4555dedb43026782f4943faf0156fe7acf89454228",
}


def fetch(package: str, integrity: str, files: dict[str, str], folder: Path) -> None:
    """Write files of an npm package into a folder. Raises ValueError for a package with another hash."""
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["npm", "pack", "--silent", package], cwd=work, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(work).glob("*.tgz")
        found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != integrity:
            raise ValueError(f"{package}: its hash is {found}, expected {integrity}; do not use it until you know why")
        with tarfile.open(archive) as content:
            for name, out in files.items():
                data = content.extractfile(name).read()
                # Without the line that names the source map: browsers would request it, and it is not there.
                lines = [
                    line for line in data.splitlines(keepends=True) if not line.startswith(b"//# sourceMappingURL")
                ]
                (folder / out).write_bytes(b"".join(lines))


if __name__ == "__main__":
    try:
        fetch(PACKAGE, INTEGRITY, FILES, PAGE)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{error}")
    print(*(PAGE / name for name in FILES.values()), sep="\n")
