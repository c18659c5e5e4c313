"""lmms-eval's own environment: a venv over this one, with what lmms-eval needs beside it.

torch, transformers, datasets and their like are not installed a second time: the venv sees this environment's
packages behind its own. Nothing is ever installed into this one. `make lmms-setup` makes one by this module.
"""

import hashlib
import secrets
import shutil
import site
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from sima_ray.errors import ClusterError
from sima_ray.runtime.cluster import home

_INSTALL_TIMEOUT_S = 900
_ABANDONED_AFTER_S = 4 * _INSTALL_TIMEOUT_S
"""Nobody makes an environment for so long: each of its two commands would have run out of time."""


def default_folder(requirements: str) -> Path:
    """Where this machine keeps the environment for these requirements: $SIMA_HOME/lmms-eval-…"""
    return home() / f"lmms-eval-{_stamp(requirements)}"


def prepare(folder: Path, requirements: str) -> Path:
    """Make the environment, unless it is there with the same requirements, and return its Python.

    Args:
        folder: Where; made anew as a whole, so that none is ever half there.
        requirements: The text of a requirements file, complete and pinned: it is installed with --no-deps.

    Raises:
        ClusterError: It cannot be made; says what pip said.
    """
    python, stamp = folder / "bin" / "python", _stamp(requirements)
    _remove_abandoned(folder)  # also where one is ready: who was killed is usually followed at once
    if _is_ready(folder, stamp):
        return python
    # Under a name of its own: another job may be making the same environment now.
    part = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part")
    try:
        _make(part, requirements)
        (part / "ready").write_text(stamp)
        if not _is_ready(folder, stamp):
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    except OSError as error:
        if not _is_ready(folder, stamp):  # it has not come from elsewhere at this very moment
            raise ClusterError(
                f"{folder}: lmms-eval's environment cannot be made: {error}"
            ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return python


def _is_ready(folder: Path, stamp: str) -> bool:
    ready = folder / "ready"
    return ready.exists() and ready.read_text() == stamp and (folder / "bin" / "python").exists()


def _remove_abandoned(folder: Path) -> None:
    """Remove what jobs left that were killed while they made this environment."""
    for part in folder.parent.glob(f"{folder.name}.*.part"):
        # One that is gone or renamed meanwhile was another job's to remove or to finish.
        with suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER_S:
                shutil.rmtree(part, ignore_errors=True)


def _make(part: Path, requirements: str) -> None:
    _run(sys.executable, "-m", "venv", "--without-pip", str(part))
    file = part / "requirements.txt"
    file.write_text(requirements, encoding="utf-8")
    # Before it sees our packages: what is pinned is then there, whatever version we have.
    pip = (sys.executable, "-m", "pip", "--python", str(part / "bin" / "python"), "install")
    _run(*pip, "--quiet", "--disable-pip-version-check", "--no-deps", "-r", str(file))
    ours = "".join(f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages())
    for packages in (part / "lib").glob("python*/site-packages"):
        # By addsitedir, so that the .pth files there take effect too.
        (packages / "_packages_of_sima_ray.pth").write_text(ours, encoding="utf-8")


def _run(*command: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"lmms-eval's environment cannot be made: {error}") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise ClusterError(
            f"lmms-eval's environment cannot be made here: {said}; where no package index can be reached, "
            "make one elsewhere and name its Python with --python"
        )


def _stamp(requirements: str) -> str:
    """Names the requirements and the environment below."""
    return hashlib.sha256(f"{sys.prefix}\n{requirements}".encode()).hexdigest()[:12]


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).read_text(encoding="utf-8"))
