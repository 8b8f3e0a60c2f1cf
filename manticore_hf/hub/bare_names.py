"""A name without an owner is a repository of the Hub's first years (gpt2), or a mistyped directory.

So the Hub is asked for it once. Its client tries an ordinary download five times, with pauses, before it says that it
has no connection.
"""

import os

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.file_download import repo_folder_name

from manticore_hf.modeling.settings_manticore import ManticoreError

_SECONDS = 10


def check_bare_name(
    what: str,
    repo_id: str,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> None:
    """Raises ManticoreError if a name has no owner, is not in the cache, and the Hub cannot be reached.

    What else may be wrong with the repository is found by the download.

    Args:
        what: How a message calls what was named.
        repo_id: The name; where it is of a directory, it is not to be asked for.
        token, cache_dir, local_files_only: As for `hf_hub_download`.
    """
    if "/" in repo_id or local_files_only or constants.HF_HUB_OFFLINE:
        return
    folder = repo_folder_name(repo_id=repo_id, repo_type="model")
    if os.path.isdir(os.path.join(cache_dir or constants.HF_HUB_CACHE, folder, "snapshots")):
        return
    try:
        HfApi().model_info(repo_id, timeout=_SECONDS, token=token)
    except HfHubHTTPError:
        return
    except (HTTPError, OSError) as err:
        said = " ".join(str(err).split()).rstrip(".")
        raise ManticoreError(
            f"{what}: there is no directory {repo_id!r} here, and the Hub cannot be asked for a repository of that "
            f"name ({said})."
        ) from err
