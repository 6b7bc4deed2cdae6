"""The model card of a bundle, written from its provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["HUB_LICENCES", "licence_notice", "licence_notices", "model_card", "teachers_of", "with_benchmarks"]

# licences that the hub knows by an identifier of its own; each of them allows derived works
HUB_LICENCES = {"apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0"}


def licence_notice(teacher: dict[str, Any]) -> str | None:
    """Say what the teacher's licence means for a student; None if derived works are allowed.

    Parameters
    ----------
    teacher
        As :func:`histill.models.bundle.teacher_record` makes it.
    """
    name, licence = teacher.get("name", "?"), teacher.get("licence")
    if teacher.get("derivatives") is False:
        return (
            f"The licence of the teacher {name} ({licence}) FORBIDS DERIVATIVES. A model distilled from it may be one: "
            "do not share or use it without the permission of the teacher's owners."
        )
    if licence is None or teacher.get("derivatives") is None:
        known = f"({licence}) " if licence else ""
        return (
            f"It is not known whether the licence of the teacher {name} {known}allows derived works. "
            "Read it before you share or use a model distilled from this teacher."
        )
    return None


def teachers_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All teachers of a provenance, the first one first: see :func:`histill.models.bundle.teacher_record`."""
    further = record.get("further_teachers")
    found = [record.get("teacher"), *(further if isinstance(further, list) else [])]
    return [teacher for teacher in found if isinstance(teacher, dict)]


def licence_notices(record: dict[str, Any]) -> str | None:
    """Say what the licences of all teachers mean for a student; None if each of them allows derived works."""
    return "\n\n".join(filter(None, map(licence_notice, teachers_of(record)))) or None


def model_card(name: str, config: dict[str, Any], record: dict[str, Any]) -> str:
    """Write ``README.md``: the hub's YAML head, licence notices, how to use the model, what it was made from.

    Parameters
    ----------
    name
        Name of the model.
    config
        The bundle's ``config.json``.
    record
        The bundle's ``histill.json``.
    """
    parts = [_head(record), f"# {name}\n", _licences(record), _usage(name, config, record)]
    parts += [_origin(config, record), _metrics(record)]
    return "\n".join(part for part in parts if part)


def _head(record: dict[str, Any]) -> str:
    licence = record.get("licence")
    lines = ["---", "library_name: timm", "pipeline_tag: image-feature-extraction"]
    if licence and licence.lower() in HUB_LICENCES:
        lines.append(f"license: {licence.lower()}")
    else:
        lines += ["license: other", f"license_name: {re.sub(r'[^a-z0-9.]+', '-', (licence or 'not stated').lower())}"]
    lines += ["tags:", *(f"- {tag}" for tag in ("timm", "pathology", "histology", "distillation", "histill"))]
    return "\n".join([*lines, "---", ""])


def _licences(record: dict[str, Any]) -> str:
    notices = filter(None, map(licence_notice, teachers_of(record)))
    lines = [f"> **WARNING.** {notice}\n" for notice in notices]
    lines.append(f"Licence of this model: {record.get('licence') or 'its owner has not stated one yet'}.")
    lines.append("For research; not a medical device.\n")
    return "\n".join(lines)


def _usage(name: str, config: dict[str, Any], record: dict[str, Any]) -> str:
    cfg = config["pretrained_cfg"]
    both = record["embedding"] == "cls+mean"
    mean_too = "torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens:].mean(dim=1)], dim=1)"
    rule = mean_too if both else "tokens[:, 0]"
    words = "the class token and the mean of the patch tokens" if both else "the class token"
    width = config["num_features"] * (2 if both else 1)
    return f"""## Use

```python
import timm, torch

model = timm.create_model("local-dir:{name}", pretrained=True).eval()   # or "hf-hub:OWNER/{name}"
mean = torch.tensor({cfg["mean"]}).view(3, 1, 1)
std = torch.tensor({cfg["std"]}).view(3, 1, 1)
images = torch.rand(1, 3, {cfg["input_size"][1]}, {cfg["input_size"][2]})   # RGB in 0..1
tokens = model.forward_features((images - mean) / std)
embedding = {rule}   # (1, {width})
```

Embedding: **{record["embedding"]}**, {words}, {width} numbers. The metrics below are those of this embedding.
"""


def _origin(config: dict[str, Any], record: dict[str, Any]) -> str:
    rows = [("architecture", f"`{config['architecture']}` with `{json.dumps(config['model_args'])}`")]
    rows.append(("parameters", f"{record['params']:,}"))
    for teacher in teachers_of(record):
        rows.append(("teacher", str(teacher.get("name", "?"))))
        rows.append(("licence of the teacher", str(teacher.get("licence") or "unknown")))
        if teacher.get("source_url"):
            rows.append(("source of the teacher", str(teacher["source_url"])))
    rows.append(("made by", f"histill {record['histill_version']}; full provenance in `histill.json`"))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return f"## Origin\n\n| | |\n|---|---|\n{table}\n"


def _metrics(record: dict[str, Any]) -> str:
    metrics = record.get("metrics")
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)} if metrics else {}
    if not numbers:
        return ""
    table = "\n".join(f"| {key} | {value:.4g} |" for key, value in numbers.items())
    return f"## Metrics\n\n| metric | value |\n|---|---|\n{table}\n"


_BEGIN, _END = "<!-- histill benchmarks: begin -->", "<!-- histill benchmarks: end -->"


def with_benchmarks(text: str, name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Put benchmark scores into a card: a table between two comments, and the hub's ``model-index`` in the YAML head.

    Parameters
    ----------
    text
        The card. An older table of ours is replaced, and so are our entries of the index; all else stays as it is.
    name
        Of the model, where the index does not say it yet.
    rows
        As :func:`histill.models.bundle.write_benchmarks` takes them.

    Raises
    ------
    ValueError
        The YAML head is damaged, or only one of the two comments is there.
    """
    from huggingface_hub import EvalResult, ModelCard

    ours = [
        EvalResult(
            task_type="image-feature-extraction",
            dataset_type=row["benchmark"].lower(),
            dataset_name=row["benchmark"],
            dataset_config=row["data"],
            metric_type=row["score"],
            metric_name=f"{row['score']}, pooling {row['pooling']}",
            metric_value=round(row["value"], 4),
            metric_args={key: _rounded(row[key]) for key in ("low", "high", "date", "histill")},
        )
        for row in rows
        if row["value"] is not None
    ]
    whole = _with_section(text, _section(rows))
    try:
        card = ModelCard(whole)
    except Exception as error:  # of the YAML parser, which is the hub library's own choice
        raise ValueError(f"the YAML head of the card is damaged: {error}") from None
    head: Any = card.data
    others = [each for each in head.eval_results or [] if "histill" not in (each.metric_args or {})]
    head.eval_results = [*others, *ours] or None
    head.model_name = (head.model_name or name) if head.eval_results else None
    return str(card)


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _section(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| benchmark | data | pooling | score | value | 95 % interval | date |", "|---|---|---|---|---:|---|---|"]
    for row in rows:
        value = "not defined" if row["value"] is None else f"{row['value']:.4f}"
        ends = "none" if row["low"] is None or row["high"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
        cells = (row["benchmark"], row["data"], row["pooling"], row["score"], value, ends, row["date"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = [f"- {row['benchmark']}, {row['score']}, {row['pooling']}: {row['note']}" for row in rows if row["note"]]
    versions = ", ".join(sorted({row["histill"] for row in rows}))
    parts = [_BEGIN, "## Benchmarks", "\n".join(lines), *(["\n".join(notes)] if notes else [])]
    return "\n\n".join([*parts, f"Measured with histill {versions} on these weights.", _END])


def _with_section(text: str, section: str) -> str:
    if (text.count(_BEGIN), text.count(_END)) == (0, 0):
        return f"{text.rstrip()}\n\n{section}\n"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{_BEGIN} and {_END} do not stand once each, in this order")
    return before + section + after
