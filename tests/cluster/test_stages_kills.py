"""A run that loses a replica and a whole node ends like one that lost nothing."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "stages_on_nodes.py"


def test_a_lost_replica_and_a_lost_node_cost_no_row(tmp_path: Path) -> None:
    # In a process of its own: this one has the session's cluster.
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    found = json.loads(line)  # among lines of Ray's own
    print(found)
    assert found["rows"] == [300, 300]
    assert len(set(found["hashes"])) == 1
    assert found["once"] == 2  # a critique in each order
    # Asked again is what was on its way where it was lost: for each loss less than a block of four requests a row.
    assert 0 < found["again"] <= 2 * 40
    assert found["committed_at_node_loss"] < 300 and found["replicas"] > 2
