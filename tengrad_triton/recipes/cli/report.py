"""`tengrad-triton report`: from the folder of a run to a page with its figures. All numbers come from the folder."""

import shlex
from pathlib import Path
from typing import Any

from tengrad_triton import files
from tengrad_triton.recipes.errors import UsageError
from tengrad_triton.recipes.optimizers.tengrad import ExactSettings
from tengrad_triton.recipes.reports.run_figures import FIGURES, MARK, draw
from tengrad_triton.recipes.reports.run_page import GENERATED, Run, markdown
from tengrad_triton.recipes.training.run_folder import RunFolder
from tengrad_triton.recipes.training.settings import Settings

SESSION: dict[str, type] = {"device_type": str, "train_images": int, "test_images": int}


def read(folder: RunFolder, settings: Settings, local_data: bool) -> Run:
    """Return a run; raises `UsageError` if a file is missing or damaged, or if no epoch has ended yet."""
    sessions = folder.read_json("machine.json")
    if not isinstance(sessions, list) or not sessions or not all(map(_is_session, sessions)):
        raise UsageError(f"{folder.path / 'machine.json'}: expected a list of starts, each with {', '.join(SESSION)}")
    steps_per_epoch = -(-sessions[-1]["train_images"] // settings.batch_size)
    history = folder.read_metrics(steps_per_epoch) if (folder.path / "metrics.json").exists() else {}
    if not history:
        command = f"tengrad-triton train --resume {shlex.quote(str(folder.path))}"
        raise UsageError(f"{folder.path}: no epoch has ended yet: go on with `{command}`")
    ours = [name for name in settings.optimizer if isinstance(settings.of(name), ExactSettings)]
    summaries = {name: folder.read_text(f"{name}-summary.txt") for name in ours}
    return Run(settings, local_data, sessions, history, summaries)


def write(run: Run, page: Path) -> None:
    """Write the page, and its figures beside it.

    Raises `UsageError` if one of them cannot be written, or exists and was not written by this library.
    """
    if page.suffix != ".md":
        raise UsageError(f"--to {page}: expected a Markdown file: let its name end in .md")
    try:
        page = page.resolve() if page.is_symlink() and page.exists() else page
        for file in (page, *(page.with_name(f"{page.stem}-{name}.png") for name in FIGURES)):
            files.check_writable(file)
            if file.exists() and not _is_ours(file):
                raise UsageError(f"--to {page}: {file} is there, and not written by this command: name another file")
        page.parent.mkdir(parents=True, exist_ok=True)
        draw(run.history, run.title, page.parent, f"{page.stem}-")
        with files.replacing(page) as temporary:
            temporary.write_text(markdown(run, page.stem), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--to {page}: cannot be written ({files.reason(error)}): name another file") from error


def _is_ours(file: Path) -> bool:
    if file.suffix == ".md":
        return files.begins_with(file, GENERATED.encode())
    return files.begins_with(file, MARK, within=1024)


def _is_session(session: Any) -> bool:
    return isinstance(session, dict) and all(isinstance(session.get(key), kind) for key, kind in SESSION.items())
