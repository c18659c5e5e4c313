"""The images that a prompts file names, fetched into a folder: only those, not a whole data set's archive.

An image counts as there when it is whole: its length is the server's, and it decodes to its end. So the same
command goes on after any interruption, and mends what was cut off.
"""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx

from sima_ray.data.locations import MAX_IMAGE_BYTES, load_image
from sima_ray.data.names import bare_name
from sima_ray.data.prompts import read_lines
from sima_ray.errors import ConfigError, DataError, one_line, why
from sima_ray.images import ImageProblem, check_image

COCO = "http://images.cocodataset.org/train2017/"
"""Where COCO keeps the images of LLaVA-Instruct, each by its bare name. It speaks no https."""

ATTEMPTS = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
TIMEOUT_S = 30.0
"""Without a byte."""
HOPELESS = 20
"""So many failures and no image: the address is wrong, or the server is away."""
MAY_PASS = {408, 425, 429, 500, 502, 503, 504}

_NO_ADDRESS = (httpx.InvalidURL, UnicodeError)
"""What httpx raises for a text that is no URL; the latter for a host that no name can have."""


@dataclass(slots=True)
class Fetched:
    """What became of the images: `wanted` = `there` + `fetched` + those that failed."""

    wanted: int
    there: int = 0
    fetched: int = 0
    size: int = 0
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Why, by name."""

    @property
    def done(self) -> int:
        """So many have ended, in whatever way."""
        return self.there + self.fetched + len(self.failed)


class _Failed(Exception):
    """An image that cannot be had; `again`: trying again may help."""

    def __init__(self, message: str, again: bool) -> None:
        super().__init__(message)
        self.again = again


def fetch_images(
    prompts: str,
    folder: Path,
    url: str = COCO,
    *,
    connections: int = 16,
    max_pixels: int = 50_000_000,
    on_progress: Callable[[Fetched], None] = lambda _: None,
) -> Fetched:
    """Fetch what is not there yet.

    Args:
        prompts: JSON lines; lines that are no prompts are left to `sima validate`.
        folder: Where the images go, by their bare names: an image root that knows all of COCO's layouts.
        url: What the names are relative to.
        connections: At once.
        max_pixels: A larger image is not kept.
        on_progress: Called after each image.

    Raises:
        ConfigError: `url` is no http(s) address.
        DataError: The prompts cannot be read or name no image; the server gives none of them.
    """
    _check_address(url)
    names = sorted(set(_names(prompts)))
    if not names:
        raise DataError(f"{prompts}: names no image")
    fetch = _Fetch(folder, url.rstrip("/") + "/", max_pixels, Fetched(len(names)), on_progress)
    try:
        asyncio.run(fetch.all(names, connections))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return fetch.found


@dataclass
class _Fetch:
    folder: Path
    url: str
    max_pixels: int
    found: Fetched
    on_progress: Callable[[Fetched], None]

    async def all(self, names: list[str], connections: int) -> None:
        left = iter(names)
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        async with (
            httpx.AsyncClient(limits=limits, timeout=TIMEOUT_S, follow_redirects=True) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(connections):
                group.create_task(self._some(client, left))

    async def _some(self, client: httpx.AsyncClient, left: Iterator[str]) -> None:
        for name in left:
            try:
                if await asyncio.to_thread(self._is_there, name):
                    self.found.there += 1
                else:
                    size = await self._fetched(client, name)
                    self.found.size += size
                    self.found.fetched += 1
            except _Failed as failure:
                self.found.failed[name] = str(failure)
                # What is there already tells that the address is right, not that the server is up.
                hopeless = failure.again or not self.found.there
                if len(self.found.failed) >= HOPELESS and not self.found.fetched and hopeless:
                    raise DataError(
                        f"{self.url}: none of {HOPELESS} images could be fetched, the last one for: {failure}"
                    ) from None
            self.on_progress(self.found)

    def _is_there(self, name: str) -> bool:
        try:
            load_image(str(self.folder), name, self.max_pixels)
        except ImageProblem:
            return False
        return True

    async def _fetched(self, client: httpx.AsyncClient, name: str) -> int:
        """Bytes of an image that was fetched and is whole."""
        for attempt in range(ATTEMPTS):
            try:
                data = await self._asked(client, name)
            except _Failed as failure:
                if not failure.again or attempt == ATTEMPTS - 1:
                    raise
                pause = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            else:
                await asyncio.to_thread(self._keep, name, data)
                return len(data)
        raise AssertionError("unreachable")

    async def _asked(self, client: httpx.AsyncClient, name: str) -> bytes:
        data = bytearray()
        try:
            async with client.stream("GET", self.url + quote(name)) as answer:
                if answer.status_code != httpx.codes.OK:
                    again = answer.status_code in MAY_PASS
                    raise _Failed(f"HTTP {answer.status_code} {answer.reason_phrase}", again)
                async for part in answer.aiter_bytes():
                    data += part
                    if len(data) > MAX_IMAGE_BYTES:
                        raise _Failed(f"over {MAX_IMAGE_BYTES:,} bytes", False)
        except (httpx.TooManyRedirects, *_NO_ADDRESS) as error:
            raise _Failed(one_line(error), False) from error
        except (
            httpx.RequestError
        ) as error:  # also a body that is cut short, or not packed as it says
            raise _Failed(one_line(error), True) from error
        try:
            await asyncio.to_thread(check_image, bytes(data), self.max_pixels)
        except ImageProblem as problem:
            raise _Failed(str(problem), False) from problem
        return bytes(data)

    def _keep(self, name: str, data: bytes) -> None:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise DataError(f"{target}: cannot be written: {why(error)}") from error


def _check_address(url: str) -> None:
    try:
        address = httpx.URL(url)
        scheme, host = address.scheme, address.host
    except _NO_ADDRESS as error:
        raise ConfigError(
            f"{url}: no address ({one_line(error)}): give one as in {COCO}"
        ) from error
    if scheme not in ("http", "https") or not host:
        raise ConfigError(f"{url}: must be an http or https address, as in {COCO}")


def _names(prompts: str) -> Iterator[str]:
    """The images' bare names; of a name that leads out of the folder, nothing."""
    for line in read_lines(prompts):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        image = values.get("image") if isinstance(values, dict) else None
        if isinstance(image, str) and (name := bare_name(image.strip())):
            yield name
