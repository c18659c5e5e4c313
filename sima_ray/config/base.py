"""What all sections of the run config share."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _absolute(path: str) -> str:
    """A local path made absolute: a job runs in another folder than it was submitted from."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


Location = Annotated[str, AfterValidator(_absolute)]
"""A local path, or any URI that pyarrow opens. Relative paths count from the current folder."""


def _mounted(path: str) -> str:
    if "://" in path:
        raise ValueError("must be a path that all nodes mount, not a URI")
    return _absolute(path)


Folder = Annotated[str, AfterValidator(_mounted)]
"""A local path, on a volume that all nodes mount. Relative paths count from the current folder."""


class Section(BaseModel):
    """Base of all sections: an unknown key is an error, and a config never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
