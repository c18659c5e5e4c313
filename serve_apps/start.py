"""What Ray Serve LLM should leave out when a replica starts."""

from ray.llm._internal.common.callbacks.base import CallbackBase


class NoDownloads(CallbackBase):
    """Models are folders that the replica sees: no task on every node to fetch them first."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
