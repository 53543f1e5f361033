"""Third-party files of the page equal those that npm published, and the page loads nothing from other hosts."""

import hashlib
import importlib.util
import re
from pathlib import Path

from pathflip_jax.viewer.page_files import page_files

ROOT = Path(__file__).resolve().parents[2]


def test_openseadragon_is_the_pinned_one_with_its_licence():
    spec = importlib.util.spec_from_file_location("npm", ROOT / "requirements/npm.py")
    npm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(npm)
    files = page_files()
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in npm.HASHES} == npm.HASHES
    assert files["openseadragon.min.js"].startswith(f"//! {npm.PACKAGE.replace('@', ' ')}\n".encode())
    assert b"Redistribution and use" in files["LICENSE.openseadragon.txt"]


def test_the_page_names_no_other_site_and_loads_what_is_there():
    files = page_files()
    for name, data in files.items():
        if "openseadragon" not in name:
            assert set(re.findall(rb"https?://[^\"' ]+", data)) <= {b"http://www.w3.org/2000/svg"}, name
    index = files["index.html"].decode()
    named = re.findall(r'(?:src|href)="page/([^"]+)"', index)
    assert set(named) | {"index.html", "LICENSE.openseadragon.txt"} == files.keys()
    assert 'type="module"' not in index, "no module loads from file://"
    used = set(re.findall(r'\$\("([\w-]+)"\)', (files["app.js"] + files["list.js"]).decode()))
    assert used <= set(re.findall(r'id="([\w-]+)"', index)), "a control that the page does not have"
