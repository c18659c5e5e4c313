"""A policy's replicas on a cluster that grows and shrinks with them: no request fails."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "elastic_nodes.py"


def test_nodes_join_for_the_load_and_go_with_it() -> None:
    # In a process of its own: this one has the session's cluster.
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"nodes"')]
    found = json.loads(line)  # among lines of Ray's own
    print(found)
    assert found["failures"] == [] and found["answers"] > 50
    assert found["nodes"] == [1, 3, 1]
