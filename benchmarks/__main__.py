"""`python -m benchmarks` (or `make bench`): run every benchmark, one after the other."""

from benchmarks import controls, service

if __name__ == "__main__":
    service.main([])
    controls.main([])
