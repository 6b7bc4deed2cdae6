"""Memory and time of the prototype loss on all tokens: chunked, and with all logits held.

K = 65,536 prototypes, all 256 tokens of two 224 px global crops, batch 8 (4,096 tokens), a teacher of 384 features
and a student bottleneck of 256; loss and gradients. Each variant runs in a process of its own, whose peak resident
memory is printed, beside the time that the matrix products alone would take at the speed of a large product measured
in the same process.

    python benchmarks/prototype_loss.py [--threads 2] [--repeats 2] [--tokens 4096] [--prototypes 65536]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

VARIANTS = ("chunked", "plain", "neither")
TEACHER, BOTTLENECK, ITERATIONS = 384, 256, 3
TEACHER_T, STUDENT_T = 0.07, 0.1
DEMAND_GB = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--chunk-rows", type=int, default=0, help="0: the library's choice")
    parser.add_argument("--variant", choices=VARIANTS, help="run this one here and print JSON")
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    size = f"{options.tokens:,} tokens x {options.prototypes:,} prototypes"
    print(f"{size}, float32, {options.threads} threads, forward and backward")
    print(f"{'variant':<9}{'peak GB':>9}{'seconds':>9}{'products':>10}{'time/products':>15}{'GFLOP/s peak':>14}  loss")
    rows = {name: run(name) for name in VARIANTS}
    for name, row in rows.items():
        if name == "neither":
            print(f"{'(inputs)':<9}{row['peak_gb']:>9.2f}")
            continue
        products = row["flop"] / row["flop_per_s"]
        print(
            f"{name:<9}{row['peak_gb']:>9.2f}{row['seconds']:>9.1f}{products:>10.1f}"
            f"{row['seconds'] / products:>15.2f}{row['flop_per_s'] / 1e9:>14.0f}  {row['loss']:.6f}"
        )
    peak = rows["chunked"]["peak_gb"]
    print(f"demand: chunked under {DEMAND_GB:g} GB: {'met' if peak < DEMAND_GB else 'NOT MET'} ({peak:.2f} GB)")


def run(variant: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, float] = json.loads(output)
    return row


def measure(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from histill.distill.losses import chunked_prototype_loss, ibot_loss, sinkhorn

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokens, prototypes = options.tokens, options.prototypes
    teacher_ME = F.normalize(torch.randn(tokens, TEACHER), dim=1)
    prototypes_KE = F.normalize(torch.randn(prototypes, TEACHER), dim=1)
    hidden_MB = F.normalize(torch.randn(tokens, BOTTLENECK), dim=1).requires_grad_()
    weight_KB = F.normalize(torch.randn(prototypes, BOTTLENECK), dim=1).requires_grad_()
    weights_M = torch.full((tokens,), 1.0 / tokens)

    def chunked() -> torch.Tensor:
        return chunked_prototype_loss(
            hidden_MB,
            weight_KB,
            teacher_ME,
            prototypes_KE,
            weights_M,
            teacher_temperature=TEACHER_T,
            student_temperature=STUDENT_T,
            iterations=ITERATIONS,
            chunk_rows=options.chunk_rows or None,
        ).loss

    def plain() -> torch.Tensor:
        targets_MK = sinkhorn(teacher_ME @ prototypes_KE.T, TEACHER_T, ITERATIONS)
        return ibot_loss((hidden_MB @ weight_KB.T)[None], targets_MK[None], student_temperature=STUDENT_T)

    seconds, loss, teacher_products = float("inf"), float("nan"), ITERATIONS + 1 if options.variant == "chunked" else 1
    for _ in range(options.repeats if options.variant != "neither" else 0):
        hidden_MB.grad = weight_KB.grad = None
        start = time.perf_counter()
        value = chunked() if options.variant == "chunked" else plain()
        value.backward()  # type: ignore[no-untyped-call]
        seconds, loss = min(seconds, time.perf_counter() - start), value.item()
        del value
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "peak_gb": peak_gb,
        "seconds": seconds,
        "loss": loss,
        "flop": 2.0 * tokens * prototypes * (TEACHER * teacher_products + 3 * BOTTLENECK),
        "flop_per_s": matmul_speed(),
    }


def matmul_speed(size: int = 2048, repeats: int = 8) -> float:
    """Floating-point operations per second of a square float32 product; the fastest counts."""
    import torch

    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


if __name__ == "__main__":
    main()
