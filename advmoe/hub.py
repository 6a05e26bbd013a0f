"""Models on the hub: `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION` instead of the path of a checkpoint.

A repository contains the model as safetensors (weights and configuration, no pickle).
`$HF_ENDPOINT` names another server. `$HF_TOKEN` or `hf auth login` gives access to private
repositories. Files are cached in the hub library's usual folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from advmoe.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"
"""Name of the model in a repository."""
ADDRESS = re.compile(r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>.+))?")
"""`Path` turns two slashes into one."""
COMMIT = re.compile(r"[0-9a-f]{40}")
"""A revision that never changes."""
CONTACT = 10.0
"""Longest wait in seconds for the hub's first answer about a file."""
SILENCE = 120.0
"""Longest wait in seconds for the next bytes from the hub, or until it takes bytes of an upload."""


def is_address(place: Path | str) -> bool:
    """Whether a path is an address on the hub."""
    return str(place).startswith("hf:")


def fetch(place: Path | str) -> Path:
    """The local copy of a model file: the path itself, or the downloaded file of an address on the hub.

    Raises:
        ConfigError: The address is malformed, or the hub's library is not installed.
        CheckpointError: There is no such repository, or it cannot be reached.
    """
    if not is_address(place):
        return Path(place)
    found = ADDRESS.fullmatch(str(place))
    if found is None:
        raise ConfigError(f"expected an address such as hf://owner/name or hf://owner/name@revision, got '{place}'")
    with hub_errors(f"hf://{found['repository']}") as hub:
        file = {"repo_id": found["repository"], "filename": WEIGHTS, "revision": found["revision"]}
        endpoint = os.environ.get("HF_ENDPOINT")
        cached = hub.try_to_load_from_cache(**file)
        if isinstance(cached, str) and COMMIT.fullmatch(found["revision"] or ""):
            return Path(cached)
        try:  # hf_hub_download repeats this question for minutes if there is no answer
            answer = hub.get_hf_file_metadata(hub.hf_hub_url(**file, endpoint=endpoint), timeout=CONTACT)
        except _network_errors(hub) as error:
            if isinstance(cached, str) and getattr(error, "response", None) is None:
                return Path(cached)
            raise
        latest = hub.try_to_load_from_cache(**file | {"revision": answer.commit_hash})
        if isinstance(cached, str) and cached == latest:  # else hf_hub_download asks again, which keeps it up to date
            return Path(cached)
        return Path(hub.hf_hub_download(**file, endpoint=endpoint))


def check_repository(name: str) -> None:
    """Check that a name can be that of a repository.

    Raises:
        ConfigError: The name is malformed.
    """
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        raise ConfigError(f"expected a repository on the hub such as owner/name, got '{name}'")


def check_access(repository: str, *, private: bool) -> None:
    """Contact the hub before the files of an upload are made, which takes time.

    Raises:
        ConfigError: The name is malformed, or the hub's library is not installed.
        CheckpointError: The hub cannot be reached or knows no such user, or the repository is public
            and should be private.
    """
    check_repository(repository)
    with hub_errors(repository) as hub:
        api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.whoami()
        if private and api.repo_exists(repository):
            _check_private(api, repository)


def _check_private(api: Any, repository: str) -> None:
    """Refuse a public repository."""
    if not api.repo_info(repository).private:
        raise CheckpointError(
            f"{repository} exists and is public, so nothing was uploaded; make it private on the hub first, or "
            "give another name"
        )


def push(folder: Path, repository: str, *, replaces: Sequence[str] = (), private: bool, message: str) -> str:
    """Upload all files of a folder to a repository, which is made if there is none.

    Args:
        folder: The files.
        repository: OWNER/NAME.
        replaces: Names of files that an earlier upload may have left. Those that are not in the
            folder are deleted, because they belong to another model.
        private: Whether nobody else may see the repository.
        message: Title of the commit.

    Returns:
        The address of the repository in a browser.

    Raises:
        ConfigError: The name is malformed, or the hub's library is not installed.
        CheckpointError: The hub refuses the upload or cannot be reached, or the repository is public
            and should be private. Nothing is uploaded then.
    """
    check_repository(repository)
    with hub_errors(repository) as hub:
        api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        # not False: an organization may make its repositories private by default
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if private:  # one that exists stays as it is
            _check_private(api, repository)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=message, delete_patterns=list(replaces)
        )
    return str(address)


@contextmanager
def hub_errors(what: str) -> Iterator[ModuleType]:
    """The hub's library. Its errors, and network errors, become one-line errors of this package.

    Raises:
        ConfigError: The library is not installed.
        CheckpointError: The hub or the network failed.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConfigError("the hub needs huggingface-hub; install it with: pip install 'advmoe[hub]'") from error
    try:
        with _finite_waits(huggingface_hub):
            yield huggingface_hub
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{what} has no {WEIGHTS}: it was not uploaded by this project") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{what} is not there, or is private and $HF_TOKEN gives no access to it") from error
    except errors.LocalTokenNotFoundError as error:
        raise CheckpointError(
            f"the hub takes {what} from a known user only, and there is no token; set $HF_TOKEN or run 'hf auth login'"
        ) from error
    except (*_network_errors(huggingface_hub), errors.HFValidationError, ValueError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"the hub cannot give or take {what}: {reason.strip(' .')}{_remedy(error, status)}"
        ) from error


def _network_errors(hub: ModuleType) -> tuple[Any, ...]:
    """The errors of the hub's network library, which differs between versions, and OSError."""
    bases: tuple[Any, ...] = hub.errors.HfHubHTTPError.__bases__
    return bases


@contextmanager
def _finite_waits(hub: ModuleType) -> Iterator[None]:
    """Let the clients of the hub's library fail after `SILENCE` seconds where they would wait forever.

    Clients that the program makes (`huggingface_hub.set_client_factory`) keep their own time-outs.
    The library makes another client after a failed connection. Its factory has no public name, and
    `set_client_factory` would close the client that other threads may use.
    """
    from huggingface_hub.utils import _http as http

    factory = http._GLOBAL_CLIENT_FACTORY
    before: list[tuple[Any, Any]] = []

    def finite(client: Any) -> Any:
        before.append((client, client.timeout))
        if client.timeout.read is None:
            client.timeout = SILENCE
        return client

    http._GLOBAL_CLIENT_FACTORY = lambda: finite(factory())
    try:
        finite(hub.get_session())
        yield
    finally:
        http._GLOBAL_CLIENT_FACTORY = factory
        for client, timeout in reversed(before):  # a client may be noted twice
            client.timeout = timeout


def _remedy(error: Exception, status: int | None) -> str:
    """What to do about an error of the hub, as the end of a message."""
    if status in {401, 403}:
        return "; give a token that may do this in $HF_TOKEN, or by 'hf auth login'"
    if status is not None and (status == 429 or status >= 500):
        return "; try again later"
    unreachable = not isinstance(error, ValueError | RuntimeError) and status is None
    return f"; check the network{' and $HF_ENDPOINT' if 'HF_ENDPOINT' in os.environ else ''}" if unreachable else ""
