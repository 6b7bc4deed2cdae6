"""A trained slide classifier as a file: gated attention over the tiles of a slide, several runs together.

Shapes: R runs, S slides, N tiles, D features, H hidden, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from histill import files
from histill.errors import DataError
from histill.evaluate.eva.mil import Parameters, attention_weights, class_scores, pooled_tiles
from histill.evaluate.features import Array

__all__ = ["SlideHead", "read_head", "write_head"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlideHead:
    """Networks that classify a slide by the features of its tiles; their answers are averaged."""

    parameters: Parameters
    classes: tuple[str, ...]
    facts: dict[str, Any]
    """``encoder``, ``weights``, ``pooling``, ``seeds``, ``epochs``, ``slides``, ``key``."""

    @property
    def dim(self) -> int:
        """Width D of a feature."""
        return int(self.parameters["project.weight"].shape[1])

    def predict(self, bags: Sequence[Array]) -> NDArray[np.float64]:
        """Probabilities (S, C) of the classes of slides, each (N, D)."""
        scores_SC: NDArray[np.float64] = class_scores(self.parameters, [self._fitting(bag) for bag in bags]).mean(
            axis=0
        )
        return scores_SC

    def attention(self, bag_ND: Array) -> NDArray[np.float32]:
        """Weight (N,) of each tile of a slide, mean over the runs; they add up to 1."""
        weight_N: NDArray[np.float32] = attention_weights(self.parameters, self._fitting(bag_ND)).mean(axis=0)
        return weight_N

    @torch.no_grad()
    def embed(self, bag_ND: Array) -> NDArray[np.float32]:
        """What a slide's tiles are summed to, by each run: (R, H)."""
        bag = torch.from_numpy(np.ascontiguousarray(self._fitting(bag_ND), np.float32))
        runs = len(self.parameters["project.weight"])
        bags = bag.expand(runs, 1, *bag.shape)
        summed_RBH, _ = pooled_tiles(self.parameters, bags, torch.zeros(bags.shape[:3], dtype=torch.bool))
        slide_RH: NDArray[np.float32] = summed_RBH[:, 0].numpy()
        return slide_RH

    def _fitting(self, bag_ND: Array) -> Array:
        if bag_ND.ndim != 2 or not len(bag_ND) or bag_ND.shape[1] != self.dim:
            raise DataError(
                "these features do not fit this slide classifier", got=bag_ND.shape, allowed=f"(tiles, {self.dim})"
            )
        return bag_ND


def write_head(path: Path, head: SlideHead) -> None:
    """Write it as safetensors: ``<layer>.weight`` (R, in, out), ``<layer>.bias`` (R, 1, out); the rest is metadata."""
    told = {"format": "pt", "classes": json.dumps(head.classes), "facts": json.dumps(head.facts)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in head.parameters.items()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=told)


def read_head(path: Path) -> SlideHead:
    """Read what :func:`write_head` wrote.

    Raises
    ------
    DataError
        The file is missing, damaged or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            parameters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        classes, facts = json.loads(told["classes"]), json.loads(told["facts"])
        assert "project.weight" in parameters
    except FileNotFoundError:
        raise DataError("there is no slide classifier here", where=path) from None
    except (OSError, SafetensorError, KeyError, ValueError, AssertionError) as error:
        raise DataError("this is no slide classifier, or it is damaged", where=path, got=repr(error)) from None
    return SlideHead(parameters=parameters, classes=tuple(classes), facts=facts)
