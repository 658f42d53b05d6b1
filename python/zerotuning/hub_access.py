"""Access to the Hugging Face hub: whether the hub can be reached, and one wording of the errors without a network."""

from __future__ import annotations

from zerotuning.errors import ZeroTuningError

#: Seconds for the one request that finds out whether the hub can be reached.
TIMEOUT = 10


def is_repository_name(text: str) -> bool:
    r"""Whether a text can name a hub repository: "name" or "owner/name", no path with ., ~, \ or more slashes."""
    return not text.startswith((".", "~", "/")) and text.count("/") <= 1 and "\\" not in text


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set: the hub's libraries then read their cache and make no requests."""
    import huggingface_hub

    return bool(huggingface_hub.constants.HF_HUB_OFFLINE)


def connection_error() -> str | None:
    """Try once to reach the hub.

    transformers and datasets retry for 20 seconds to a minute, which is long for a mistyped name.

    Returns:
        Why the hub cannot be reached; None if the hub can be reached.
    """
    import huggingface_hub

    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=TIMEOUT)
    except Exception as error:  # the type depends on huggingface_hub's HTTP client
        return f"cannot connect to {endpoint} ({error})"
    return None


def repository_connection_error(repository: str, file: str) -> str | None:
    """`connection_error` for a file of a repository, without a request for cached files or with HF_HUB_OFFLINE."""
    import huggingface_hub

    if is_offline() or huggingface_hub.try_to_load_from_cache(repository, file) is not None:
        return None
    return connection_error()


def first_line(error: Exception, longest: int = 200) -> str:
    """An error's first nonempty line, less its full stop, cut at `longest` characters; else the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    return reason if len(reason) <= longest else reason[: longest - 1] + "…"


def fetch_error(what: str, reason: str, alternative: str) -> ZeroTuningError:
    """Return the error for a failed download.

    Args:
        what: What failed, such as "cannot load model NAME".
        reason: Why, in one line.
        alternative: What the user can do without a network, such as "name a local folder".
    """
    return ZeroTuningError(f"{what}: {reason.rstrip('.')}; without a network, {alternative}")
