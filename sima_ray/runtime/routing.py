"""Routing by image where a cluster's Serve can have it."""

import logging
from typing import Any

import ray

from sima_ray.config import ServiceConfig
from sima_ray.runtime.applications import client
from sima_ray.runtime.deployment import IMAGE_ROUTER

logger = logging.getLogger(__name__)


def with_possible_routing(service: ServiceConfig, router: str = IMAGE_ROUTER) -> ServiceConfig:
    """The service as it is, or routed by load where Serve's controller cannot import the router.

    The controller imports it whenever it reads a declaration: without this project on the head node, no
    application could be changed any more. Serve must run.
    """

    # Nested, so that it travels by value.
    def has(controller: Any, module: str) -> bool:
        import importlib

        try:
            importlib.import_module(module)
        except ImportError:
            return False
        return True

    module = router.partition(":")[0]
    if service.routing == "load" or ray.get(client()._controller.__ray_call__.remote(has, module)):
        return service
    logger.warning("Routing by load: this project is not installed on the cluster's head node")
    return service.model_copy(update={"routing": "load"})
