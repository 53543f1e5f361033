"""Files of the page, which the server sends and static pages contain."""

from importlib import resources


def page_files() -> dict[str, bytes]:
    """Files of the page by name; `index.html` refers to the others as `page/NAME`."""
    folder = resources.files("pathflip_jax.viewer") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
