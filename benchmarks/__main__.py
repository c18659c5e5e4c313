"""`python -m benchmarks` (or `make bench`): run every quick benchmark; `make proof` is the long one."""

import sys

from benchmarks import service
from benchmarks.tuning import __main__ as tuning

if __name__ == "__main__":
    service.main([])
    sys.exit(tuning.main([]))
