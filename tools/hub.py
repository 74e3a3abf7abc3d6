"""Downloads weights, tokenizer or data of a repository of the Hugging Face Hub, or says in one line why it cannot.

Only data is fetched: safetensors and text, never pickles or code.
"""

from __future__ import annotations

import functools
import glob
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

from titan_hd.console import Progress, on_terminal, tell
from titan_hd.data.sources import ENDINGS
from titan_hd.data.text.chat import TOOL_TEMPLATE
from titan_hd.data.text.tokenizer import TOKENIZER_FILES
from titan_hd.errors import UserError

# What to fetch -> patterns of file names. Weights come with the configuration that says what they are.
PATTERNS = {
    "weights": ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    "config": ("config.json", "generation_config.json"),
    "tokenizer": TOKENIZER_FILES,
    "data": tuple("*" + ending for ending in ENDINGS),
}
# Folders of a model's repository hold other formats of the same weights, and `consolidated` is Mistral's own.
_NOT_OF_A_MODEL = ("*/*", "consolidated*")
# Descriptions of a data set, not records.
_NOT_DATA = ("dataset_infos.json", ".*")


def download(
    repo: str, repo_type: str, assets: list[str], folder: Path, revision: str | None = None, token: str | None = None
) -> list[Path]:
    """Fetch what of `assets` the repository has into a folder; what is there already is not fetched again.

    Args:
        repo: owner/name.
        repo_type: "model" or "dataset".
        assets: keys of PATTERNS.
        revision: branch, tag or commit; the main branch if None.
        token: of an account that may read the repository; HF_TOKEN or the saved login if None.

    Returns:
        the files, all complete.

    Raises:
        UserError: with one line: no such repository, revision or file, no permission, or no connection.
    """
    from huggingface_hub import HfApi, snapshot_download

    ignored = list(_NOT_OF_A_MODEL if repo_type == "model" else _NOT_DATA)
    patterns = [pattern for asset in assets for pattern in PATTERNS[asset]]
    try:
        api = HfApi(token=token)
        look_up = api.model_info if repo_type == "model" else api.dataset_info
        info = look_up(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        ignored_names = {name for name in sizes if _matches(name, ignored) and name != TOOL_TEMPLATE}
        wanted = [name for name in sizes if _matches(name, patterns) and name not in ignored_names]
        if "weights" in assets and not any(name.endswith(".safetensors") for name in wanted):
            raise UserError(f"--assets: {repo} has no weights as safetensors, and no others are read")
        for asset in assets:
            if not any(_matches(name, PATTERNS[asset]) for name in wanted):
                raise UserError(f"--assets: {repo} has no {asset} of a kind that is read: {', '.join(PATTERNS[asset])}")
        total, poll = sum(sizes[name] or 0 for name in wanted), functools.partial(_fetched, folder, wanted)
        # On a terminal the library draws bars of its own.
        with Progress(f"downloading {repo}", total, "B", shown=not on_terminal(), said=tell, poll=poll):
            snapshot_download(
                repo,
                repo_type=repo_type,
                revision=info.sha,
                local_dir=folder,
                allow_patterns=[glob.escape(name) for name in wanted],
                token=token,
            )
    except Exception as error:
        _explain(error, repo, repo_type, revision)
    # snapshot_download only warns, and returns the folder as it is, when the connection is lost.
    torn = [name for name in wanted if _size(folder / name) != sizes[name]]
    if torn:
        raise UserError(f"{folder}: {torn[0]} and {len(torn) - 1} more are incomplete; the same command goes on")
    return [folder / name for name in wanted]


def _matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _fetched(folder: Path, wanted: list[str]) -> int:
    """Bytes of the wanted files that are there, whole or in parts (which the hub's library keeps below .cache)."""
    whole = sum(max(0, _size(folder / name)) for name in wanted)
    parts = (folder / ".cache" / "huggingface").rglob("*.incomplete")
    return whole + sum(max(0, _size(part)) for part in parts)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _explain(error: Exception, repo: str, repo_type: str, revision: str | None) -> NoReturn:
    """Raise the line that belongs to an error of the hub's library; another error goes on as it is."""
    from huggingface_hub import constants
    from huggingface_hub import utils as hub

    site = constants.ENDPOINT
    page = f"{site}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.GatedRepoError) or status == 403:
        line = f"--repo: {repo} is gated: accept its licence on {page} and pass a token (--token or HF_TOKEN)"
    elif isinstance(error, hub.RevisionNotFoundError):
        line = f"--revision: {repo} has no {revision}"
    elif isinstance(error, hub.RepositoryNotFoundError) or status == 401:
        kind = f"--repo: {site} has no {repo_type} {repo} that you may read"
        line = f"{kind}; check the name, and pass a token (--token or HF_TOKEN) if it is private or gated"
    elif isinstance(error, hub.HFValidationError):
        line = f"--repo: must be owner/name, not {repo!r}"
    elif isinstance(error, hub.HfHubHTTPError):
        line = f"{page}: the hub answered with status {status}; the same command goes on"
    elif isinstance(error, hub.LocalEntryNotFoundError) or _is_transport(error):
        line = f"{page}: no connection ({type(error).__name__}: {str(error).splitlines()[0]}); the same command goes on"
    elif isinstance(error, OSError):
        line = f"{page}: cannot be written here: {error}"
    else:
        raise error
    raise UserError(line) from None


def _is_transport(error: Exception) -> bool:
    """The hub's library speaks HTTP through another library in each of its major versions."""
    return isinstance(error, ConnectionError) or type(error).__module__.split(".")[0] in ("requests", "httpx", "httpx2")
