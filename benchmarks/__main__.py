"""`python -m benchmarks` (or `make bench`): run the quick benchmarks.

The long ones have commands of their own: `make proof`, `python -m benchmarks.load`, `.routing` and `.pipeline`.
"""

import sys

from benchmarks import service
from benchmarks.tuning import __main__ as tuning

if __name__ == "__main__":
    service.main([])
    sys.exit(tuning.main([]))
