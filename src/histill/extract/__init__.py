"""Slides -> feature files. The package is a function too: ``histill.extract(slides, model=..., out=...)``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histill.tiles.write import Outcome

__all__ = ["extract"]


def extract(
    slides: str | Path | Sequence[str | Path], *, model: str | Path, out: str | Path, **options: Any
) -> Outcome:
    """Turn slides into feature files; a folder that is there gets only what it lacks.

    Parameters
    ----------
    slides
        Slides, DICOM folders, and folders of them at any depth.
    model
        A bundle's folder, a name of ``histill models``, ``timm:NAME`` or ``hf-hub:ORG/NAME``.
    out
        The feature folder: ``features/<slide>.h5``, ``slides.csv``.
    **options
        Any further field of :class:`histill.extract.config.ExtractConfig`, as ``mpp=0.5`` or ``workers=8``. Reader
        processes are spawned, so a script needs its ``__main__`` guard.

    Returns
    -------
    Outcome
        Records of the slides that were ``done`` and that ``failed``; a slide that fails raises nothing.

    Raises
    ------
    ConfigError, ModelError, RunError, DataError
        An option, the model, the folder or the disk is at fault.
    """
    from rich.console import Console

    from histill import config as configs
    from histill.extract.config import ExtractConfig
    from histill.extract.run import extract_slides

    paths = [slides] if isinstance(slides, str | Path) else list(slides)
    values = options | {"slides": [str(path) for path in paths], "model": str(model), "out": str(out)}
    config = configs.from_dict(ExtractConfig, values, where="histill.extract")
    return extract_slides(config, Console(stderr=True))


class _CallablePackage(ModuleType):
    """``histill.extract`` is this package as soon as any part of it is imported, and a function to its users."""

    def __call__(self, *arguments: Any, **options: Any) -> Outcome:
        return extract(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
