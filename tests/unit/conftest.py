"""Settings of the property tests, and what the tests of the critic's client share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_critic import FakeCritic
from hypothesis import settings

# No deadline: a machine that is busy with something else is no failure.
settings.register_profile("unit", deadline=None, max_examples=50)
settings.load_profile("unit")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The client's settings: none but the test's."""
    for name in (
        "SIMA_CRITIC_URL",
        "SIMA_CRITIC_TOKEN",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SIMA_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def server() -> Iterator[FakeCritic]:
    """A critic over real HTTP."""
    with FakeCritic() as fake:
        yield fake
