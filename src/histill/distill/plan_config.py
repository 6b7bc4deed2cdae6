"""What a plan can be told, and what is known of GPUs. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from histill.errors import ConfigError, nearest

__all__ = ["GPUS", "Gpu", "PlanConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU, by its maker's data sheet."""

    title: str
    bf16_tflops: float
    """Dense bfloat16 matrix products with float32 sums, 10^12 operations a second."""
    tf32_tflops: float
    """The same of float32 numbers rounded to TF32."""
    memory_gb: float
    """10^9 bytes."""


GPUS: dict[str, Gpu] = {
    "a100": Gpu(title="NVIDIA A100 80 GB SXM", bf16_tflops=312, tf32_tflops=156, memory_gb=80),
    "h100": Gpu(title="NVIDIA H100 SXM", bf16_tflops=989, tf32_tflops=494, memory_gb=80),
    "h200": Gpu(title="NVIDIA H200 SXM", bf16_tflops=989, tf32_tflops=494, memory_gb=141),
    "b200": Gpu(title="NVIDIA B200", bf16_tflops=2250, tf32_tflops=1125, memory_gb=180),
    "l40s": Gpu(title="NVIDIA L40S", bf16_tflops=362, tf32_tflops=183, memory_gb=48),
    "rtx4090": Gpu(title="NVIDIA RTX 4090", bf16_tflops=165, tf32_tflops=82.6, memory_gb=24),
    "mi300x": Gpu(title="AMD MI300X", bf16_tflops=1307, tf32_tflops=653, memory_gb=192),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What a run would cost, before anything is downloaded or trained."""

    world: int = 1
    """GPUs, one process each."""
    gpu: tuple[str, ...] = ("a100", "h100")
    """Kinds of GPU."""
    utilisation: float = 0.4
    """Share of the data sheet's rate that the run is assumed to reach. An assumption, not a measurement."""
    tiles: float = 1e8
    """Length of the run in tiles seen, where --steps does not say it."""
    tile_px: int = 224
    """Side of the tiles, where the preset leaves the crops' sides open."""

    def __post_init__(self) -> None:
        """Check each field."""
        for name in self.gpu:
            if name not in GPUS:
                raise ConfigError(
                    "this GPU is not in the table",
                    where="--plan.gpu",
                    got=name,
                    allowed=", ".join(GPUS),
                    remedy=nearest(name, GPUS),
                )
        for name, value, holds, allowed in (
            ("world", self.world, self.world >= 1, "1 or more"),
            ("utilisation", self.utilisation, 0 < self.utilisation <= 1, "above 0, up to 1"),
            ("tiles", self.tiles, self.tiles >= 1, "1 or more"),
            ("tile_px", self.tile_px, self.tile_px >= 14, "14 or more"),
        ):
            if not holds:
                raise ConfigError("out of range", where=f"--plan.{name.replace('_', '-')}", got=value, allowed=allowed)
