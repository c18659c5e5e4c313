"""Requests that schemathesis draws from the service's own OpenAPI document, sound ones and broken ones."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from benchmarks.hostile.attacks import TOKEN
from benchmarks.hostile.run import Findings


def send_generated(url: str, document: dict[str, Any], requests: int, findings: Findings) -> None:
    """Send so many requests, over all routes of the document."""
    schema = schemathesis.openapi.from_dict(document)
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    # The routes without arguments have one request each.
    small = [op for op in operations if op.method.upper() == "GET"]
    for operation in operations:
        modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
        if operation in small:
            modes = modes[:1]
        for i, mode in enumerate(modes):
            rest = len(modes) * max(1, len(operations) - len(small))
            wanted = 1 if operation in small else max(1, (requests - len(small)) // rest)
            strategy = operation.as_strategy(generation_mode=mode)

            @seed(i)
            @settings(
                max_examples=wanted,
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            )
            @given(case=strategy)
            def send(case: Any) -> None:
                headers = {"Authorization": f"Bearer {TOKEN}"}
                reply = case.call(base_url=url, headers=headers)
                findings.see("schemathesis", reply.status_code, reply.text)

            send()
