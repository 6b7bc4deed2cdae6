"""Seconds of the EVA linear probe: all runs together in memory, beside a plain PyTorch loop per run.

The plain loop is what one writes without thinking of speed: per run a DataLoader, nn.Linear, autograd, AdamW, and a
pass over the validation set after every epoch; same start, order and schedule. It is timed in two forms: with the
features in one tensor, and with one file per embedding, as the original keeps them. Since every step costs the same,
the plain loops run for some epochs and are scaled to the steps that the runs took; the result is compared with one
full plain run (``--full``: with all of them).

Our training takes one thread, whatever --threads says.

    python benchmarks/probe.py [--images 5000] [--classes 9] [--runs 5] [--steps 12500] [--threads 2]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from histill.evaluate.eva.probe import ProbeSchedule, batch_order, start_weights, train_probes
from histill.evaluate.eva.scoring import balanced_accuracy

DIM, BATCH, DEMAND = 768, 256, 100.0


def features(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features with the spectrum of an encoder's; classes overlap, so that accuracies lie near those published."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    centres, spectrum = fixed.standard_normal((classes, DIM)), 1 / (1 + np.arange(DIM)) ** 0.4
    label = rng.integers(classes, size=count)
    x = (rng.standard_normal((count, DIM)) + 0.09 * centres[label]) * spectrum
    return x.astype(np.float32), label.astype(np.int64)


class Files(Dataset):
    """One ``.pt`` file per embedding, read when it is asked for."""

    def __init__(self, folder: Path, x: np.ndarray, y: np.ndarray) -> None:
        self.paths = [folder / f"{row}.pt" for row in range(len(x))]
        self.y = torch.from_numpy(y)
        for path, row in zip(self.paths, x, strict=True):
            torch.save(torch.from_numpy(row), path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.load(self.paths[row], weights_only=True), self.y[row]


def plain_run(data: Dataset, stop: Dataset, classes: int, seed: int, schedule: ProbeSchedule) -> tuple[float, int]:
    """One run as one would write it; the best validation accuracy and the steps that it took."""
    head = torch.nn.Linear(DIM, classes)
    start = start_weights(seed, DIM, classes)
    with torch.no_grad():
        head.weight.copy_(start[:, :-1])
        head.bias.copy_(start[:, -1])
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.0)
    patience = max(1, round(schedule.patience * -(-schedule.steps // -(-len(data) // BATCH))))
    best, waited, step, epoch = -1.0, 0, 0, 0
    while step < schedule.steps and waited < patience:
        for x, y in DataLoader(data, batch_size=BATCH, sampler=batch_order(seed, epoch, len(data)).tolist()):
            loss = torch.nn.functional.cross_entropy(head(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
            if step == schedule.steps:
                break
        epoch += 1
        predicted, label = [], []
        with torch.no_grad():
            for x, y in DataLoader(stop, batch_size=BATCH):
                predicted.append(head(x).argmax(dim=1))
                label.append(y)
        score = balanced_accuracy(torch.cat(predicted).numpy(), torch.cat(label).numpy())
        best, waited = (score, 0) if score > best else (best, waited + 1)
    return best, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--stop-images", type=int, default=1000)
    parser.add_argument("--classes", type=int, default=9)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12_500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plain-epochs", type=int, default=5, help="timed of the loop in memory; files: 1")
    parser.add_argument("--full", action="store_true", help="compare the result with all plain runs, not with one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, stop = features(options.images, options.classes, 1), features(options.stop_images, options.classes, 2)
    epoch_steps = -(-options.images // BATCH)
    schedule = ProbeSchedule(steps=options.steps)
    began = time.perf_counter()
    probes = train_probes(*train, *stop, classes=options.classes, seeds=range(options.runs), schedule=schedule)
    ours, all_steps = time.perf_counter() - began, sum(probes.steps)
    scores = np.array(probes.stop_scores)
    print(f"{options.runs} runs, n {options.images:,}, d {DIM}, {options.classes} classes, {options.threads} threads")
    print(f"together, in memory: {ours:8.1f} s, {ours / max(probes.steps) * 1e3:.3f} ms per step of all runs")
    print(f"accuracy {scores.mean():.4f}, standard deviation over runs {scores.std(ddof=1):.4f}, steps {probes.steps}")
    memory = [TensorDataset(torch.from_numpy(x), torch.from_numpy(y)) for x, y in (train, stop)]
    with tempfile.TemporaryDirectory() as folder:
        for part in ("train", "stop"):
            (Path(folder) / part).mkdir()
        files = [Files(Path(folder) / "train", *train), Files(Path(folder) / "stop", *stop)]
        for name, data, epochs in (("in memory", memory, options.plain_epochs), ("one file each", files, 1)):
            short = ProbeSchedule(steps=epochs * epoch_steps, patience=2.0)
            began = time.perf_counter()
            plain_run(*data, options.classes, 0, short)
            per_step = (time.perf_counter() - began) / short.steps
            seconds = per_step * all_steps
            print(
                f"plain loop, {name + ':':<15}{seconds:8.1f} s, {per_step * 1e3:.3f} ms per step of one run: "
                f"{seconds / ours:.0f} times ours"
            )
            ratio = seconds / ours
    print(f"demand: {DEMAND:g} times fewer seconds than over files: {'met' if ratio >= DEMAND else 'NOT MET'}")
    plain = [plain_run(*memory, options.classes, seed, schedule) for seed in range(options.runs if options.full else 1)]
    apart = max(abs(score - probes.stop_scores[seed]) for seed, (score, _) in enumerate(plain))
    same = apart <= scores.std(ddof=1)
    verdict = "within" if same else "BEYOND"
    print(f"plain runs compared: {len(plain)}; largest difference {apart:.4f}: {verdict} the spread")


if __name__ == "__main__":
    main()
