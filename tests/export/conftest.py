"""A stand-in for the Hugging Face hub, to which the tests are logged in."""

import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

sys.path.append(str(Path(__file__).parent))
from hub_server import TOKEN, Hub  # noqa: E402


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The stand-in, to which this process is logged in, with an empty cache."""
    with Hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is another service
        template = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
