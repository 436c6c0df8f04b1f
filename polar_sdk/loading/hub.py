"""Get a model from the Hugging Face hub: the local hub cache first, the network only if it lacks the model.

A cached model is used as it is, without asking whether the hub has a newer one: a host without a network
works, and a service does not change under its users. `polar models fetch org/name` asks. Only safetensors
weights are fetched. It does not know how a model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from polar_sdk.errors import ModelError, ModelFetchError, ModelNotFoundError
from polar_sdk.loading.progress import say

__all__ = ["get_snapshot"]

_PATTERNS: Final = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
_TIMEOUT_SECONDS: Final = 5.0


def get_snapshot(name: str, revision: str | None = None, *, refresh: bool = False) -> Path:
    """The local folder of a hub model.

    Args:
        name: `org/name`.
        revision: Branch, tag or commit; None is the main branch.
        refresh: Ask the hub for a newer one even if there is a local copy.

    Raises:
        ModelNotFoundError: The hub has no such model or revision, or does not show it to this user.
        ModelFetchError: The hub cannot be reached.
    """
    if not refresh and (folder := _local(name, revision)) is not None:
        return folder
    _ask_once(name, revision)
    return _download(name, revision)


def _local(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    # A download that broke off may have left a folder without weights.
    return folder if any(folder.glob("*.safetensors")) and (folder / "config.json").is_file() else None


def _ask_once(name: str, revision: str | None) -> None:
    """One short request: a host without a network hears of it now, not after the hub client's retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"hub model {name!r} is gated.", hint="Accept its terms on the hub, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"hub model {name!r} has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"model {name!r} is no local folder, and the hub has no such model.",
            hint="Check the spelling; for a private model run `hf auth login` first.",
        ) from error
    except Exception as error:  # whichever HTTP client the installed hub client is built on
        raise _unreachable(name, error) from error


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    say(f"fetching {name} from the hub")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_PATTERNS))
    except OSError as error:
        if error.errno is not None:
            raise ModelError(
                f"hub model {name!r} cannot be stored ({error.strerror}).",
                hint="Free some space, or set HF_HOME to another folder.",
            ) from error
        raise _unreachable(name, error) from error
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> ModelFetchError:
    reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return ModelFetchError(
        f"model {name!r} is no local folder, not in the hub cache, and the hub cannot be reached ({reason}).",
        hint=f"Run `polar models fetch {name}` with a network, or name a local folder or `.gguf` file.",
    )
