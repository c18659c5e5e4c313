"""The critic's bearer token on the side of those who deploy and ask: one file, made once."""

import hashlib
import secrets
from pathlib import Path

from sima_ray.runtime.cluster import home


def token_path() -> Path:
    """Where the token lies, or would: $SIMA_HOME/critic-token."""
    return home() / "critic-token"


def token_file() -> Path:
    """`token_path`, made with a random token when it is missing."""
    file = token_path()
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")  # renamed when whole: an empty token must never be one
        part.touch(mode=0o600)
        part.write_text(new_token(), encoding="utf-8")
        part.replace(file)
    return file


def new_token() -> str:
    """A random bearer token."""
    return secrets.token_urlsafe(32)


def token_hash(token: str) -> str:
    """What a service keeps of a token: a job's variables and an app's arguments are on the dashboard."""
    return hashlib.sha256(token.encode()).hexdigest()
