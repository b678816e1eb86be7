"""The report: one JSON document of all numbers, and the Markdown and HTML pages that are made of it alone."""

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.paper.published import ROWS
from tengrad_triton.recipes.paper.report import figures as drawings
from tengrad_triton.recipes.paper.report.page import finished, markdown, scale_of
from tengrad_triton.recipes.paper.report.seeds import Finished
from tengrad_triton.recipes.paper.request import INVERSES, MEASURED, Asked
from tengrad_triton.recipes.training.run_folder import RunFolder, replacing

DOCUMENT, PAGES = "paper.json", ("paper.md", "paper.html")
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 14px; } td, th { border-bottom: 1px solid #ccc; padding: 3px 9px; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }"""


def note(asked: Asked, targets: tuple[str, ...], command: Sequence[str]) -> None:
    """Keep what was asked, once each, so that the report can say how to run it again."""
    file = asked.out / "asked.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    entry = {"command": _portable(command), "scale": asked.scale.said(), "targets": list(targets)}
    if entry not in before:
        RunFolder(asked.out).write_json("asked.json", [*before, entry])


def _portable(command: Sequence[str]) -> list[str]:
    """Return a command line without this machine's folders."""
    named = {"--data": "DIR", "--out": "OUT"}
    return [named.get(before, word) for before, word in zip(["", *command], command, strict=False)]


def document(out: Path) -> dict[str, Any]:
    """Return all that the folder has measured."""
    measured = {
        name: _read(out / "results" / f"{name}.json")
        for name in (*INVERSES, *MEASURED)
        if (out / "results" / f"{name}.json").exists()
    }
    runs = [_run(file.parent, kind) for kind in ("runs", "grid") for file in sorted((out / kind).rglob("outcome.json"))]
    return {"asked": _read(out / "asked.json"), "runs": runs, "measured": measured}


def _run(folder: Path, kind: str) -> dict[str, Any]:
    """Return a finished run: its settings but for those of the other optimizers, where it ran, and its rows."""
    settings = _read(folder / "settings.json")
    (name,) = settings["optimizer"]
    own = settings[name]
    shared = {key: value for key, value in settings.items() if not isinstance(value, dict) and key != "data"}
    return {
        "row": next(row.title for row in ROWS if row.key == folder.parent.name),
        "optimizer": name,
        "kind": kind,
        "settings": {**shared, "optimizer": name},
        "own": own,
        "machine": _read(folder / "machine.json")[-1],
        **_read(folder / "outcome.json"),
    }


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: {error}: delete its folder to run it again") from error


def drawn(found: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw what the document holds; the blocks of figures 6 to 8 were drawn when they were measured."""
    files = {name: f"figures/paper-{name}.png" for name in INVERSES if name in found["measured"]}
    for row in ROWS:
        runs = finished(found, "runs").get(row.title)
        for quantity in drawings.QUANTITIES if runs else ():
            name = f"{row.key}-{quantity}"
            files[name] = drawings.curves(
                runs or [], quantity, f"{row.title}; scale: {scale_of(found, row.title)}", out, name
            )
    searched = [run for run in finished(found, "grid").get(ROWS[0].title, []) if run.optimizer == "tengrad"]
    for name, part in (("figure9", "train"), ("figure10", "test")) if searched else ():
        scale = scale_of(found, ROWS[0].title, "grid")
        title = f"{ROWS[0].title}: {part} accuracy (%) of TENGraD; scale: {scale}"
        files[name] = drawings.sensitivity(cells(searched, part), title, out, name)
    measured = found["measured"]
    if "table1" in measured:
        files["table1"] = drawings.complexity(measured["table1"]["cases"], measured["table1"]["base"], out)
    if "phases" in measured:
        files["phases"] = drawings.phases(measured["phases"]["seconds"], measured["phases"]["title"], out)
    return files


def cells(runs: Sequence[Finished], part: str) -> dict[tuple[float, float], float | None]:
    """Return the mean of the last accuracies in percent by learning rate and damping; None where one diverged."""
    points: dict[tuple[float, float], list[Finished]] = {}
    own = ROWS[0].tuned["tengrad"][1]
    for run in runs:
        if run.tuned["weight_decay"] == own:
            points.setdefault((run.tuned["lr"], run.tuned["damping"]), []).append(run)
    return {
        point: None if any(run.diverged for run in of) else statistics.mean(run.accuracies(part)[-1] for run in of)
        for point, of in points.items()
    }


def write(out: Path) -> list[Path]:
    """Write the document, the pages and their figures, and return the pages."""
    from markdown_it import MarkdownIt  # noqa: PLC0415

    found = document(out)
    with replacing(out / DOCUMENT) as temporary:
        temporary.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")
    text = markdown(found, drawn(found, out))
    body = MarkdownIt("commonmark").enable("table").render(text)
    title = html.escape(text.split("# ", 1)[1].split("\n", 1)[0])
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    texts = (text, f"{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n")
    pages = [out / name for name in PAGES]
    for page, content in zip(pages, texts, strict=True):
        with replacing(page) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return pages
