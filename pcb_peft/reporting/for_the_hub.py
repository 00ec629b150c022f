"""Files of a merge as the Hub gets them: its report as a page and a picture, a card, a recipe without local paths."""

import io
from pathlib import Path

from pcb_peft.adapters.loading import load_adapters
from pcb_peft.adapters.saving import REPORT_FILE
from pcb_peft.base.model import lazy_base
from pcb_peft.errors import AdapterError, PcbPeftError, UnsupportedError
from pcb_peft.files.json_text import read_text
from pcb_peft.merging.report import Report
from pcb_peft.merging.report_file import read_report
from pcb_peft.recipes.recipe import FILE_NAME
from pcb_peft.reporting.merge_record import record_of
from pcb_peft.reporting.page import render
from pcb_peft.runtime.progress import silent
from pcb_peft.writing.model_card import CARD

PAGE, PICTURE = "merge_report.html", "merge_report.png"
HEADING = "## Report"


def report_files(directory: Path) -> dict[str, bytes]:
    """Return the files that are sent with a merge, beside or in place of its own; none for anything else.

    The adapters are compared on the page if they are where the recipe says.

    Args:
        directory: The merge, or a model that it was folded into.

    Raises:
        AdapterError: The report beside it is damaged.
    """
    if read_report(directory) is None:
        return {}
    record = record_of(directory)
    try:
        recipe = record.recipe
        base = lazy_base(recipe.base_model, dequantize=recipe.dequantize)
        adapters = load_adapters(recipe.adapters, base_model=base)
    except PcbPeftError:  # the merge was made elsewhere
        adapters = []
    public = record.public()
    page, picture = render(public, adapters, silent), _picture(record.report)
    files = {PAGE: page.encode(), FILE_NAME: public.recipe.to_yaml().encode()}
    files |= {PICTURE: picture} if picture else {}
    card = directory / CARD
    text = read_text(card, AdapterError, "save the merge again") if card.is_file() else ""
    if text and HEADING not in text.splitlines():
        files[CARD] = f"{text.rstrip()}\n\n{_section(has_picture=bool(picture))}\n".encode()
    return files


def _section(*, has_picture: bool) -> str:
    words = "The share of each adapter's own change that the merge makes, by layer"
    shown = [f"![{words}]({PICTURE})", f"*{words}.*"] if has_picture else []
    more = f"[{PAGE}]({PAGE}) shows the whole report in a browser, [{REPORT_FILE}]({REPORT_FILE}) has its numbers."
    return "\n\n".join([HEADING, *shown, more])


def _picture(report: Report) -> bytes | None:
    """Return the figure of the shares; None where none are known, or matplotlib is not installed."""
    if not any(one.by_layer for one in report.adapters.values()):
        return None
    try:
        figure = report.plot_shares()
    except UnsupportedError:
        return None
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
