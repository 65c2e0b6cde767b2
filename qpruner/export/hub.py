"""Push a final model and its card to a model hub.

The token is that in `HF_TOKEN`, or that of `hf auth login`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpruner.errors import StageError, UserError, first_line
from qpruner.export.card import Form, missing_keys, with_loading_section
from qpruner.export.recode import read_settings
from qpruner.models.loading import checkpoint_config
from qpruner.runs.records import MARK, ExportRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import read_json
from qpruner.runs.version import VERSION
from qpruner.wording import counted

What = Literal["final", "merged", "peft"]
CARD = "README.md"
ADAPTER = "adapter_config.json"
HUBS_OWN = ".gitattributes"


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    `url` is the address of the commit; `card_lacks` lists keys to set in the section `card` of the
    configuration.
    """

    url: str
    num_files: int
    num_bytes: int
    num_removed: int
    is_private: bool
    card_lacks: tuple[str, ...]


def push(
    run: RunDir,
    repo_id: str,
    what: What,
    is_public: bool,
    notify: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Upload the final model, or an export of it, to the repository OWNER/NAME as one commit.

    All other files of the repository are deleted, because transformers would attach an old adapter
    to a merged model.

    Raises:
        UserError: There is nothing to upload, no token, or the repository may not be written so.
        StageError: The hub refuses the commit or cannot be reached.
    """
    from huggingface_hub import get_token

    # HTTPError comes from httpx in huggingface_hub 1.x and from httpx2 in 2.x; this module
    # re-exports it in both.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    run.require_folder("copy the run to a folder on this machine, and push from there")
    files = dict(_files(run, what, repo_id))
    if get_token() is None:
        raise UserError(
            "the hub needs a token: set HF_TOKEN to a token with write access, "
            "or run `hf auth login`"
        )
    message = f"{what} model of {run.root.name} (qpruner {VERSION})"
    lacking = missing_keys(_card(run))
    try:
        return _upload(files, repo_id, is_public, message, lacking, notify)
    except HFValidationError as error:
        raise UserError(
            f"REPO_ID must be OWNER/NAME, got {repo_id!r}: {first_line(error)}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            "HF_HUB_OFFLINE is set, which forbids access to the hub: unset it"
        ) from error
    except HfHubHTTPError as error:
        remedy = (
            "check that the token may write to the repository (`hf auth whoami`), "
            "then repeat the command"
        )
        raise StageError("push", first_line(error), remedy) from error
    except (OSError, HTTPError) as error:
        reason = f"the hub cannot be reached: {first_line(error)}"
        raise StageError("push", reason, "repeat the command") from error


def _upload(
    files: dict[str, Path | bytes],
    repo_id: str,
    is_public: bool,
    message: str,
    card_lacks: tuple[str, ...],
    notify: Callable[[str], None],
) -> Pushed:
    """Make a commit that adds these files and deletes all others."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    repo = api.create_repo(repo_id, private=not is_public, exist_ok=True).repo_id
    is_private = bool(api.repo_info(repo).private)
    if not is_private and not is_public:
        raise UserError(
            f"{repo} exists and is public: give `--public` to publish, or name another REPO_ID"
        )
    num_bytes = sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size
        for content in files.values()
    )
    notify(f"{counted(len(files), 'file')}, {num_bytes / 1e6:.1f} MB, uploading to {repo} ...")

    added = [CommitOperationAdd(name, content) for name, content in files.items()]
    earlier = set(api.list_repo_files(repo)) - {HUBS_OWN, *files}
    removed = [CommitOperationDelete(name, is_folder=False) for name in sorted(earlier)]
    commit = api.create_commit(repo, [*added, *removed], commit_message=message)
    return Pushed(
        url=commit.commit_url,
        num_files=len(added),
        num_bytes=num_bytes,
        num_removed=len(removed),
        is_private=is_private,
        card_lacks=card_lacks,
    )


def _files(run: RunDir, what: What, repo_id: str) -> Iterator[tuple[str, Path | bytes]]:
    """Yield file names in the repository, each with its local path or its content."""
    folder = _folder(run, what)
    yield CARD, with_loading_section(_card(run), _form(folder, what), repo_id).encode()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == ADAPTER:
            # transformers 5.24 loads the base model from this entry; a path on this machine would
            # be useless there.
            settings = read_settings(path)
            settings["base_model_name_or_path"] = repo_id
            yield ADAPTER, (json.dumps(settings, indent=2) + "\n").encode()
        elif path.is_file() and name not in (CARD, MARK):
            yield name, path


def _folder(run: RunDir, what: What) -> Path:
    """Return the folder to upload; raise `UserError` if it is missing or of an earlier model."""
    folder = run.root / "export" / what
    remedy = f"run `qpruner export {run.root} --to {what}`"
    if what == "final":
        folder = run.root / "final"
        remedy = "repeat `qpruner run`"
    if not (folder / (ADAPTER if what == "peft" else "config.json")).is_file():
        raise UserError(f"{run.root} has no {what} model: {remedy}")
    if what == "final":
        return folder
    record = read_json(folder / MARK, ExportRecord)
    if not record or record.final != run.final_digests():
        raise UserError(
            f"{folder} was exported from an earlier final model than the card describes: delete "
            f"this folder, then repeat `qpruner export {run.root} --to {what}`"
        )
    return folder


def _card(run: RunDir) -> str:
    """Read the model card of the final model, which may have been edited by hand."""
    final = run.root / "final"
    if not (final / CARD).is_file():
        raise UserError(
            f"{final} has no model card: repeat `qpruner run`, which writes it after the evaluation"
        )
    return (final / CARD).read_text(encoding="utf-8")


def _form(folder: Path, what: What) -> Form:
    if what == "final":
        return "packed"
    if what == "peft":
        return "peft"
    config = checkpoint_config(folder)
    if "auto_map" in vars(config):
        return "merged with code"
    return "merged" if config.is_heterogeneous else "merged and plain"
