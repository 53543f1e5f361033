"""Repositories of the Hugging Face hub, named hf://OWNER/NAME or hf://OWNER/NAME@REVISION.

Downloads go to the cache of `huggingface_hub`, whose settings apply: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PREFIX = "hf://"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class Repository(NamedTuple):
    """Repository of a model on the hub; `revision` is a branch, tag or commit, None for its default branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return PREFIX + self.name + (f"@{self.revision}" if self.revision else "")


def is_on_hub(place: object) -> bool:
    """Whether a text or path names a repository of the hub."""
    return str(place).startswith(PREFIX)


def read_name(place: object) -> Repository:
    """Repository that a text names. Raises ValueError for a text that names none."""
    from huggingface_hub.utils import validate_repo_id

    name, separator, revision = str(place).removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError("no owner")
    except ValueError as error:
        raise ValueError(f"{place}: not the name of a model on the hub ({error}); expected hf://OWNER/NAME") from None
    if separator and not revision:
        raise ValueError(f"{place}: no revision behind @; name a branch, tag or commit, or leave the @ out")
    return Repository(name, revision or None)


def download(place: Repository, files: Sequence[str] | None = None) -> Path:
    """Folder of a repository's `files` (patterns; None: all) in the local cache, downloaded where they are missing.

    The folder's name is the commit. Raises FileNotFoundError, PermissionError or OSError that names the repository and
    the cure: one that does not exist, a revision that it lacks, one that this account may not read, no connection.
    """
    from huggingface_hub import constants, errors, snapshot_download

    try:
        patterns = None if files is None else list(files)
        return Path(snapshot_download(place.name, revision=place.revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{place.name}"
        raise PermissionError(
            f"{place}: its owner grants access on request; ask for it at {page}, then {LOG_IN}"
        ) from None
    except errors.RevisionNotFoundError:
        known = _revisions(place)
        raise FileNotFoundError(
            f"{place}: the repository has no revision {place.revision!r}" + (f"; it has {known}" if known else "")
        ) from None
    except errors.RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{place}: no such repository, or a private one that this account may not read; check its name, or {LOG_IN}"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(_unreachable(place, error)) from None
    except (errors.HTTPError, OSError) as error:
        raise OSError(
            f"{place}: the download did not finish ({_first_line(error)}); repeat the command to continue it"
        ) from None


def _unreachable(place: Repository, error: Exception) -> str:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    folder = cache / f"models--{place.name.replace('/', '--')}"
    there = f"only a part of it is in {cache}" if (folder / "snapshots").is_dir() else f"it is not in {cache}"
    if constants.HF_HUB_OFFLINE:
        return f"{place}: {there}, and HF_HUB_OFFLINE forbids downloads; unset it, or download it where that is allowed"
    reason = _first_line(error.__cause__ or error)
    return f"{place}: {there}, and the hub cannot be reached ({reason}); connect to the network and repeat"


def _revisions(place: Repository) -> str:
    """Branches and tags of a repository; "" where they cannot be listed."""
    from huggingface_hub import HfApi, errors

    try:
        refs = HfApi().list_repo_refs(place.name)
    except (errors.HTTPError, OSError):
        return ""
    return ", ".join(ref.name for ref in [*refs.branches, *refs.tags][:8])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
