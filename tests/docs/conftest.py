"""Import path of `pages`, the helper of these tests: the folder is not a package."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("pages", Path(__file__).with_name("pages.py"))
sys.modules["pages"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["pages"])
