"""Writes the report: the document, its figures, and the Markdown and HTML pages."""

import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tengrad_triton.files import replacing
from tengrad_triton.recipes.paper.published import EXPERIMENTS
from tengrad_triton.recipes.paper.report import figures
from tengrad_triton.recipes.paper.report.document import finished, read_document, scale_of
from tengrad_triton.recipes.paper.report.page import markdown
from tengrad_triton.recipes.paper.report.seeds import Finished
from tengrad_triton.recipes.paper.request import INVERSES

DOCUMENT, PAGES = "paper.json", ("paper.md", "paper.html")
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; font-size: 14px; } td, th { border-bottom: 1px solid #ccc; padding: 3px 9px; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: 1em; overflow-x: auto; }"""


def write(out: Path) -> list[Path]:
    """Write the document, the figures and the pages; return the paths of the pages."""
    from markdown_it import MarkdownIt  # noqa: PLC0415

    document = read_document(out)
    with replacing(out / DOCUMENT) as temporary:
        temporary.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")
    text = markdown(document, draw(document, out))
    body = MarkdownIt("commonmark").enable("table").render(text)
    title = html.escape(text.split("# ", 1)[1].split("\n", 1)[0])
    head = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    texts = (text, f"{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n")
    pages = [out / name for name in PAGES]
    for page, content in zip(pages, texts, strict=True):
        with replacing(page) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return pages


def draw(document: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw all figures of the document, and return the file of each.

    Figures 6 to 8 exist already: their blocks are drawn when they are measured, and not kept.
    """
    measured = document["measured"]
    files = {name: f"figures/paper-{name}.png" for name in INVERSES if name in measured}
    for experiment in EXPERIMENTS:
        runs = finished(document, "runs").get(experiment.title)
        for quantity in figures.QUANTITIES if runs else ():
            name = f"{experiment.key}-{quantity}"
            title = f"{experiment.title}; scale: {scale_of(document, experiment.title)}"
            files[name] = figures.curves(runs or [], quantity, title, out, name)
    title = EXPERIMENTS[0].title
    searched = [run for run in finished(document, "grid").get(title, []) if run.optimizer == "tengrad_paper"]
    for name, part in (("figure9", "train"), ("figure10", "test")) if searched else ():
        heading = f"{title}: {part} accuracy (%) of TENGraD; scale: {scale_of(document, title, 'grid')}"
        files[name] = figures.sensitivity(mean_accuracies(searched, part), heading, out, name)
    if "table1" in measured:
        files["table1"] = figures.complexity(measured["table1"]["cases"], measured["table1"]["base"], out)
    if "phases" in measured:
        files["phases"] = figures.phases(measured["phases"]["seconds"], measured["phases"]["title"], out)
    return files


def mean_accuracies(runs: Sequence[Finished], part: str) -> dict[tuple[float, float], float | None]:
    """Return the mean accuracy after the last epoch, in percent, for each learning rate and damping.

    A pair has None if one of its runs diverged. Only runs with the weight decay that the paper tuned count.
    """
    points: dict[tuple[float, float], list[Finished]] = {}
    weight_decay = EXPERIMENTS[0].tuned["tengrad_paper"][1]
    for run in runs:
        if run.tuned["weight_decay"] == weight_decay:
            points.setdefault((run.tuned["lr"], run.tuned["damping"]), []).append(run)
    return {
        point: None if any(run.diverged for run in of) else statistics.mean(run.accuracies(part)[-1] for run in of)
        for point, of in points.items()
    }
