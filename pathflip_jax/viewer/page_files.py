"""The files of the page, which a server sends and a static folder holds."""

from importlib import resources


def page_files() -> dict[str, bytes]:
    """The files of the page by name; `index.html` names the others as `page/NAME`."""
    folder = resources.files("pathflip_jax.viewer") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
