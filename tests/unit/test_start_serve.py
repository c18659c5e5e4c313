"""Serve that two runs start at the same moment: one does, the other finds it."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorAlreadyExistsError

from sima_ray.errors import ServiceError
from sima_ray.runtime import serving
from sima_ray.runtime.sockets import free_ports


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Another run's Serve: it is there from the moment when this process tries to start one."""
    http, asked = SimpleNamespace(host="127.0.0.1", port=free_ports(1, "127.0.0.1")[0]), [0]

    def details() -> Any:
        asked[0] += 1
        return SimpleNamespace(http_options=http) if asked[0] > 2 else None

    def start(**_: Any) -> None:
        raise ActorAlreadyExistsError("it is there")

    monkeypatch.setattr(serving, "details", details)
    monkeypatch.setattr(serve, "start", start)
    return http


def test_the_one_that_comes_second_takes_it(other: SimpleNamespace) -> None:
    assert serving.start_serve(other.host, other.port) == other.port


def test_on_another_port_it_says_so(other: SimpleNamespace) -> None:
    with pytest.raises(ServiceError, match=f"listens on 127.0.0.1:{other.port}"):
        serving.start_serve(other.host, free_ports(1, other.host)[0])
