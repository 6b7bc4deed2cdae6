"""All pairs of a benchmark: in threads, within a memory limit, each kept as soon as it is done.

Pairs are independent: they run in as many threads as torch has, each on one core, which needs no barriers within a
product. Slides are held in two blocks that fit into the memory, so that each is prepared a few times, not once per
pair.

Shapes: N tiles, D features.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations, combinations_with_replacement, product
from typing import Literal

import torch
from rich.console import Console

from histill.errors import ConfigError
from histill.evaluate.plism.engine import CHUNK_ENTRIES, PairMetrics, Slide, compare, full_precision, prepare
from histill.evaluate.plism.fp16 import compare_fp16
from histill.evaluate.plism.groups import Pair
from histill.evaluate.plism.journal import Journal
from histill.evaluate.plism.layout import SlideName
from histill.evaluate.plism.progress import bar
from histill.evaluate.plism.source import Source

__all__ = ["PROTOCOL", "Compat", "Work"]

PROTOCOL = "plism 1"
"""Raised when the same features would give other numbers."""

Compat = Literal["none", "fp16"]
"""``none``: exact. ``fp16``: the original's numbers with its defects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """All pairs of a source; finished ones stand in the journal."""

    source: Source
    digests: dict[SlideName, str]
    dim: int
    compat: Compat
    device: torch.device
    journal: Journal

    def key(self, a: SlideName, b: SlideName) -> str:
        """All that decides a pair's numbers."""
        text = f"{PROTOCOL} {self.compat} {self.digests[a]} {self.digests[b]}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def pairs(self) -> tuple[list[Pair], float]:
        """Every pair in order of names, and the seconds that they took on one thread each."""
        keys = {(a, b): self.key(a, b) for a, b in combinations(self.source.slides, 2)}
        found = [Pair(a=a, b=b, metrics=self.journal.done[key]) for (a, b), key in keys.items()]
        return found, sum(self.journal.seconds[key] for key in keys.values())

    def run(self, memory: float, console: Console) -> None:
        """Compute what is missing, within so many bytes.

        Raises
        ------
        ConfigError
            The memory is too small for two slides.
        """
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        blocks, total = self._blocks(memory, threads), math.comb(len(self.source.slides), 2)
        held: dict[SlideName, Slide] = {}
        self_tops: dict[SlideName, torch.Tensor] = {}
        with bar("comparing pairs", total, console) as (progress, task), _threads(threads) as pool, full_precision():
            for left, right in combinations_with_replacement(blocks, 2):
                block = list(combinations(left, 2)) if left is right else list(product(left, right))
                missing = [(a, b) for a, b in block if self.key(a, b) not in self.journal.done]
                progress.advance(task, len(block) - len(missing))
                needed = {slide: None for pair in missing for slide in pair}
                held = {slide: held[slide] for slide in held if slide in needed}
                fresh = [slide for slide in needed if slide not in held]
                for slide, ready in zip(fresh, pool.map(partial(self._prepare, self_tops), fresh), strict=True):
                    held[slide], self_tops[slide] = ready, ready.self_top_NK
                futures = {pool.submit(self._compare, held[a], held[b]): (a, b) for a, b in missing}
                for future in as_completed(futures):
                    a, b = futures[future]
                    self.journal.add(self.key(a, b), (a.name, b.name), *future.result())
                    progress.advance(task)

    def _prepare(self, self_tops: Mapping[SlideName, torch.Tensor], slide: SlideName) -> Slide:
        features_ND = self.source.load(slide, None)
        return prepare(features_ND, name=slide.name, device=self.device, self_top_NK=self_tops.get(slide))

    def _compare(self, a: Slide, b: Slide) -> tuple[PairMetrics, float]:
        started = time.perf_counter()
        metrics = compare_fp16(a, b) if self.compat == "fp16" else compare(a, b)
        return metrics, time.perf_counter() - started

    def _blocks(self, memory: float, threads: int) -> list[list[SlideName]]:
        """Cut the slides into blocks, two of which fit into the memory beside the threads' own."""
        slides, tiles = list(self.source.slides), len(self.source.places_N3)
        per_slide = tiles * (2 * 4 * self.dim + 8 + 80)
        chunk = max(CHUNK_ENTRIES[self.device.type], 16 * tiles)
        per_thread = 12 * chunk + 2 * 2048 * 12 * self.dim
        if self.compat == "fp16":
            per_thread = 24 * chunk + tiles * self.dim * 16
        fixed = threads * per_thread + len(slides) * tiles * 80
        size = int((memory - fixed) // (2 * per_slide))
        if size < 1:
            raise ConfigError(
                f"two slides of {tiles} tiles and {self.dim} features do not fit into the memory limit",
                where="memory_gb",
                got=f"{memory / 1e9:g}",
                allowed=f"at least {(fixed + 2 * per_slide) / 1e9 + 0.01:.2f}",
                remedy="raise it, or take fewer tiles",
            )
        if len(slides) <= 2 * size:
            return [slides]
        return [slides[start : start + size] for start in range(0, len(slides), size)]


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that use one core each."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
