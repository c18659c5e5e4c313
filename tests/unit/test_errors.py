"""Why a file cannot be used: the system's words where there are some, else the error's own on one line."""

import errno

import pytest

from sima_ray.errors import why


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(errno.ENOENT, "Failed to open 'x'"), "No such file or directory"),
        (FileNotFoundError("x"), "No such file or directory"),
        (PermissionError(errno.EACCES, "Failed to open 'x'"), "Permission denied"),
        (OSError("AWS Error\n  ACCESS_DENIED"), "AWS Error ACCESS_DENIED"),
        (ValueError(), "ValueError"),
        (OSError("x" * 1000), f"{'x' * 299}…"),
    ],
)
def test_why(error: Exception, words: str) -> None:
    assert why(error) == words
