"""Publication of runs on the Hugging Face hub: an export with its model card, as one commit of a repository."""

import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from pathflip_jax.data.storage import hub
from pathflip_jax.data.storage.hub import LOG_IN, Repository
from pathflip_jax.export.decoder import export_decoder
from pathflip_jax.export.huggingface import export_huggingface
from pathflip_jax.inference.assistant import is_language_run
from pathflip_jax.runs.places import ABOUT_RUN, holds_run

_HOUSEKEEPING = {".gitattributes", "README.md"}  # files that the hub, or its page, puts into an empty repository


def push(run: str | Path, repository: str, *, public: bool = False, message: str = "", **export: Any) -> Repository:
    """Publish a run as OWNER/NAME; returns the repository at the new commit, which `pf.load` takes.

    The repository is created where it is missing, private unless `public`; its content is replaced in one commit, so
    that it is never half a model, and earlier commits stay. `OWNER/NAME@BRANCH` commits to a branch. `export` are the
    options of `export_huggingface`, or of `export_decoder` for a run of the language stage.

    Raises PermissionError without a token that may write there, ValueError for a repository that holds something else
    or is public unasked, OSError where the upload fails.
    """
    target = hub.read_name(repository)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "export"
        (export_decoder if is_language_run(run) else export_huggingface)(run, folder, **export)
        try:
            return _upload(folder, target, public, message or f"pathflip push: {Path(str(run)).name}")
        except errors.HfHubHTTPError as error:
            raise _refusal(target, error) from None
        except (errors.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a part of the upload failed
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
            raise OSError(f"{target}: not pushed ({reason}); what was there is unchanged: repeat the command") from None


def _upload(folder: Path, target: Repository, public: bool, message: str) -> Repository:
    api = huggingface_hub.HfApi(library_name="pathflip-jax")
    api.create_repo(target.name, private=not public, exist_ok=True)
    if target.revision:
        api.create_branch(target.name, branch=target.revision, exist_ok=True)
    _check_target(api.model_info(target.name, revision=target.revision), target, public)
    commit = api.upload_folder(
        repo_id=target.name, folder_path=folder, revision=target.revision, commit_message=message, delete_patterns="*"
    )
    return Repository(target.name, commit.oid)


def _check_target(info: huggingface_hub.ModelInfo, target: Repository, public: bool) -> None:
    """Raise ValueError for a repository of another visibility than asked for, or with something else than a run."""
    if info.private == public:
        found, cure = ("private", "leave --public out") if info.private else ("public", "pass --public")
        raise ValueError(f"{target}: exists and is {found}; {cure}, name another repository, or change it on its page")
    files = sorted({file.rfilename for file in info.siblings or ()} - _HOUSEKEEPING)
    if files and not holds_run(hub.download(Repository(target.name, info.sha), ABOUT_RUN)):
        raise ValueError(
            f"{target}: holds {len(files)} files of something else ({', '.join(files[:3])}), which would be replaced; "
            "name another repository"
        )


def _refusal(target: Repository, error: errors.HfHubHTTPError) -> OSError:
    status = error.response.status_code if error.response is not None else 0
    reason = (error.server_message or next(iter(str(error).splitlines()), "")).strip()
    if status == 401:
        return PermissionError(f"{target}: no token, or none that is valid; {LOG_IN} to one that may write")
    if status == 403:
        return PermissionError(f"{target}: this account may not write there ({reason}); {LOG_IN} to one that may write")
    return OSError(f"{target}: the hub refused the upload ({status}: {reason}); what was there is unchanged")
