"""`python -m benchmarks` (or `make bench`): run every quick benchmark; `make proof` is the long one."""

from benchmarks import service

if __name__ == "__main__":
    service.main([])
