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
from qpruner.models.loading import checkpoint_config
from qpruner.runs.records import MARK, ExportRecord
from qpruner.runs.run_dir import RunDir
from qpruner.runs.storage import read_json
from qpruner.runs.version import VERSION
from qpruner.wording import counted

What = Literal["final", "merged", "peft"]
CARD, ADAPTER = "README.md", "adapter_config.json"
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
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    # HTTPError comes from httpx in huggingface_hub 1.x and from httpx2 in 2.x; this module
    # re-exports it in both.
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        OfflineModeIsEnabled,
    )

    run.require_folder("copy the run to a folder on this machine, and push from there")
    files = list(_files(run, what, repo_id))
    num_bytes = sum(
        len(each) if isinstance(each, bytes) else each.stat().st_size for _, each in files
    )
    if get_token() is None:
        raise UserError(
            "the hub needs a token: set HF_TOKEN to a token with write access, or run `hf auth "
            "login`"
        )
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=not is_public, exist_ok=True).repo_id
        is_private = bool(api.repo_info(repo).private)
        if not is_private and not is_public:
            raise UserError(
                f"{repo} exists and is public: give `--public` to publish, or name another REPO_ID"
            )
        notify(f"{counted(len(files), 'file')}, {num_bytes / 1e6:.1f} MB, uploading to {repo} ...")
        added = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in files
        ]
        earlier = set(api.list_repo_files(repo)) - {HUBS_OWN, *(name for name, _ in files)}
        removed = [
            CommitOperationDelete(path_in_repo=name, is_folder=False) for name in sorted(earlier)
        ]
        message = f"{what} model of {run.root.name} (qpruner {VERSION})"
        commit = api.create_commit(repo, [*added, *removed], commit_message=message)
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
            "check that the token may write to the repository (`hf auth whoami`), then repeat the "
            "command"
        )
        raise StageError("push", first_line(error), remedy) from error
    except (OSError, HTTPError) as error:
        raise StageError(
            "push", f"the hub cannot be reached: {first_line(error)}", "repeat the command"
        ) from error
    return Pushed(
        commit.commit_url, len(added), num_bytes, len(removed), is_private, missing_keys(_card(run))
    )


def _files(run: RunDir, what: What, repo_id: str) -> Iterator[tuple[str, Path | bytes]]:
    """Yield file names in the repository, each with its local path or its content."""
    folder = run.root / "final" if what == "final" else run.root / "export" / what
    if not (folder / (ADAPTER if what == "peft" else "config.json")).is_file():
        remedy = (
            "repeat `qpruner run`"
            if what == "final"
            else f"run `qpruner export {run.root} --to {what}`"
        )
        raise UserError(f"{run.root} has no {what} model: {remedy}")
    record = None if what == "final" else read_json(folder / MARK, ExportRecord)
    if what != "final" and (not record or record.final != run.final_digests()):
        remedy = f"delete this folder, then repeat `qpruner export {run.root} --to {what}`"
        raise UserError(
            f"{folder} was exported from an earlier final model than the card describes: {remedy}"
        )
    yield CARD, with_loading_section(_card(run), _form(folder, what), repo_id).encode()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == ADAPTER:
            # transformers 5.24 loads the base model from this entry; a path on this machine would
            # be useless there.
            settings = json.loads(path.read_text(encoding="utf-8")) | {
                "base_model_name_or_path": repo_id
            }
            yield ADAPTER, (json.dumps(settings, indent=2) + "\n").encode()
        elif path.is_file() and name not in (CARD, MARK):
            yield name, path


def _card(run: RunDir) -> str:
    """Read the model card of the final model, which may have been edited by hand."""
    final = run.root / "final"
    if not (final / CARD).is_file():
        raise UserError(
            f"{final} has no model card: repeat `qpruner run`, which writes it after the evaluation"
        )
    return (final / CARD).read_text(encoding="utf-8")


def _form(folder: Path, what: What) -> Form:
    if what != "merged":
        return "packed" if what == "final" else "peft"
    if "auto_map" in vars(checkpoint_config(folder)):
        return "merged with code"
    return "merged" if checkpoint_config(folder).is_heterogeneous else "merged and plain"
