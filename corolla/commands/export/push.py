"""A folder on a model hub: the one of huggingface_hub, wherever HF_ENDPOINT says that it is."""

from pathlib import Path

from corolla.errors import ArtefactError, ConfigError


def refuse_offline(repository: str) -> None:
    """Raises ConfigError for a name that is none, or where the hub may not be asked."""
    from huggingface_hub import constants

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ConfigError(f"--push {repository}: expected OWNER/NAME")
    if constants.is_offline_mode():
        raise ConfigError(
            f"--push {repository}: HF_HUB_OFFLINE forbids to ask a hub: unset it, or drop --push"
        )


def push(folder: Path, repository: str) -> str:
    """Send all files of a folder to a repository, made where there is none; its address.

    The token is that of huggingface_hub: HF_TOKEN, or that of its login. Raises ArtefactError with
    what the hub, or the network, says.
    """
    import httpx
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        done = hub.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="corolla export"
        )
    except (OSError, ValueError, KeyError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ArtefactError(
            f"{folder} was written, but not sent to {repository}: {reason}"
        ) from error
    return str(done)
