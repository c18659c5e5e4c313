"""Which replica answers a request: the one that has its image's prefix cached, unless others are far less busy.

Rendezvous hashing with bounded loads: every caller ranks the replicas alike by a hash of image and replica, and
takes the first whose queue is at most `slack` longer than the shortest. So all requests about an image go to one
replica, those of an image that is asked for too often go on to its second, its third, …, and a replica that comes
or goes moves only its own share of the images.

Serve pickles this module by value for every process that calls the policy: it imports nothing of this project.
"""

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

WINDOW = 16_384
"""Bytes read of an image's head, middle and tail: two that agree there and in length merely share a replica."""


class ImageRouter(PowerOfTwoChoicesRequestRouter):
    """Routes by image; requests without one, and those that their replica has no room for, as Serve does."""

    def initialize_state(self, slack: int = 8) -> None:  # type: ignore[override]
        """Serve's hook, with `request_router_kwargs`.

        Args:
            slack: How much longer than the shortest queue the queue of an image's replica may be, in requests.
        """
        self._slack = slack
        self._routed: WeakValueDictionary[int, PendingRequest] = WeakValueDictionary()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Serve's hook: the replicas to try, in this order."""
        by_load = await super().choose_replicas(candidate_replicas, pending_request)
        if pending_request is None:
            return by_load
        self._routed[id(pending_request.metadata)] = pending_request
        if len(candidate_replicas) < 2 or not pending_request.args:
            return by_load
        key = image_key(pending_request.args[0])
        if key is None:
            return by_load
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # A replica that this process has not heard of for seconds has none of its requests.
        known = self._replica_queue_len_cache
        queues = {name: known.get(r.replica_id) or 0 for name, r in replicas.items()}
        return [[replicas[choose(key, queues, self._slack)]], *by_load]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Serve's hook; the request was counted when its replica was chosen."""

    def _fulfill_next_pending_request(
        self, replica: RunningReplica, request_metadata: Any = None
    ) -> None:
        # Counted now, not when it is sent: of many that come at once, each must see those before it. One that was
        # cancelled meanwhile is not sent; its place goes to the next that waits, if any.
        waiting = self._get_pending_request_matching_metadata(request_metadata) or next(
            (one for one in self._pending_requests_to_fulfill if not one.future.done()), None
        )
        if waiting is not None:
            RequestRouter.on_send_request(self, replica.replica_id)
        super()._fulfill_next_pending_request(replica, request_metadata)

    def _get_pending_request_matching_metadata(
        self, request_metadata: Any = None
    ) -> PendingRequest | None:
        # A replica is chosen for one request, so first in, first out would mix them up. Ids would as well: calls
        # that one request to another deployment makes, such as a critic's, share its id.
        found = self._routed.get(id(request_metadata))
        return None if found is None or found.future.done() else found


def image_key(request: object) -> bytes | None:
    """What requests about the same image share; None without an image. Never raises, whatever was sent.

    The question is no part of it: the image, the longer part of the prefix, is shared by all questions about it.
    """
    if isinstance(request, list) and request:  # of one call: all about one image
        request = request[0]
    content = request.get("content") if isinstance(request, dict) else None
    if not isinstance(content, list):
        return None
    images = [part.get("image") for part in content if isinstance(part, dict)]
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        if isinstance(image, bytes):
            view, middle = memoryview(image), len(image) // 2
            digest.update(len(image).to_bytes(8, "big"))
            for start in (0, middle, max(0, len(image) - WINDOW)):
                digest.update(view[start : start + WINDOW])
    return digest.digest() if any(isinstance(image, bytes) for image in images) else None


def choose(key: bytes, queues: Mapping[str, int], slack: int) -> str:
    """The replica for a key: the first in the key's own order that is not too busy.

    Args:
        key: Of the image.
        queues: How many requests each replica has; not empty.
        slack: How many more than the least busy one it may have.
    """
    limit = min(queues.values()) + slack
    return max((name for name in queues if queues[name] <= limit), key=lambda name: rank(key, name))


def rank(key: bytes, replica: str) -> bytes:
    """Where a replica stands in a key's order: the highest is first. The same in every process."""
    return hashlib.blake2b(replica.encode(), key=key, digest_size=8).digest()
