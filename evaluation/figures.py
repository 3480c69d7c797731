"""Draw the pages of pictures of a test run: scores of each organ, overlays of each case."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from common.errors import cannot_write
from datasets.colours import label_colours
from evaluation.charts import draw_scores, save
from evaluation.overlays import CasePanel
from evaluation.tables import CaseResult, case_means
from evaluation.views import SHOWN_SIDE, font, framed, save_picture, slice_title

CASES_A_PAGE = 6
ROWS = ".rows"  # folder of a picture and the volumes of each case, until the pages are written
WIDEST = 4096  # pixels; pictures of more than 682 px shrink where a case shows three slices
MARGIN, GAP, LINE, HEADING = 10, 6, 20, 26  # pixels
INK, SOFT = "#1c2530", "#5c6875"


def save_case(folder: Path, panel: CasePanel, result: CaseResult) -> None:
    """Write the row of a case, so that no pictures wait in memory for the pages."""
    (dsc,) = (row["dsc"] for row in case_means([result]))
    caption = "no organ" if dsc is None else f"mean DSC {100 * dsc:.1f} %"
    path = folder / ROWS / f"{result.case}.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_case(panel, caption, ("truth", "prediction")).save(path, compress_level=1)
    except OSError as error:
        raise cannot_write(path, error) from None


def remove_rows(folder: Path) -> None:
    """Delete the rows and volumes of cases, which only the pages need."""
    shutil.rmtree(folder / ROWS, ignore_errors=True)


def write_pages(
    folder: Path, results: Sequence[CaseResult], class_names: Sequence[str]
) -> list[Path]:
    """Write `dsc_per_organ.png` and `overlays.png`, or `overlays_1.png` … for many cases.

    The rows of the cases are those that `save_case` wrote into the same folder.
    """
    pages = [folder / "dsc_per_organ.png"]
    save(draw_scores(results, class_names), pages[0])
    for name, shown in zip(page_names(len(results)), batched(results), strict=True):
        rows = []
        for result in shown:
            with Image.open(folder / ROWS / f"{result.case}.png", formats=["PNG"]) as row:
                rows.append(row.convert("RGB"))
        save_picture(draw_page(rows, class_names), folder / name)
        pages.append(folder / name)
    return pages


def batched(results: Sequence[CaseResult]) -> list[Sequence[CaseResult]]:
    """Return the cases of each page."""
    starts = range(0, len(results), CASES_A_PAGE)
    return [results[start : start + CASES_A_PAGE] for start in starts]


def page_names(cases: int) -> list[str]:
    """Return the names of the pages of overlays for this number of cases."""
    count = -(-cases // CASES_A_PAGE)
    return ["overlays.png"] if count == 1 else [f"overlays_{i}.png" for i in range(1, count + 1)]


def draw_overlays(
    panels: Sequence[CasePanel],
    captions: Sequence[str],
    class_names: Sequence[str],
    kinds: tuple[str, str] = ("truth", "prediction"),
) -> Image.Image:
    """Draw one row for each case: two pictures of each slice side by side, a caption above."""
    rows = [
        draw_case(panel, caption, kinds) for panel, caption in zip(panels, captions, strict=True)
    ]
    return draw_page(rows, class_names)


def draw_page(rows: Sequence[Image.Image], class_names: Sequence[str]) -> Image.Image:
    """Draw rows of cases below each other, and the legend below them."""
    width = max(row.width for row in rows)
    parts = [*rows, draw_legend(class_names, width)]
    page = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def draw_case(panel: CasePanel, caption: str, kinds: tuple[str, str]) -> Image.Image:
    """Draw the slices of one case in a row, its name and caption above them."""
    columns = 2 * len(panel.slices)
    longest = min(SHOWN_SIDE[1], (WIDEST - 2 * MARGIN) // columns - GAP)
    facts = [text for text in (panel.case, caption, panel.window) if text]
    heading = "   ".join(facts)
    shown, titles = [], []
    for index, number in enumerate(panel.slices):
        title = slice_title(number, panel.depth, panel.places[index])
        for kind, pictures in zip(kinds, (panel.truth, panel.prediction), strict=True):
            shown.append(framed(pictures[index], panel.view, longest))
            titles.append((title, kind))
    two_lines = panel.depth > 1
    top = MARGIN + HEADING + LINE * (2 if two_lines else 1)
    # Titles are wider than the pictures of narrow slices.
    texts = [max(font(13).getlength(line) for line in title) for title in titles]
    steps = [
        GAP + max(picture.width, round(text) + GAP)
        for picture, text in zip(shown, texts, strict=True)
    ]
    width = max(
        2 * MARGIN + sum(steps) - GAP, 2 * MARGIN + round(font(15, bold=True).getlength(heading))
    )
    row = Image.new("RGB", (width, top + shown[0].height + MARGIN), "white")
    draw = ImageDraw.Draw(row)
    draw.text((MARGIN, MARGIN), heading, font=font(15, bold=True), fill=INK)
    left = MARGIN
    for picture, (title, kind), step in zip(shown, titles, steps, strict=True):
        draw.text((left, top - 3), kind, font=font(13), fill=SOFT, anchor="ld")
        if two_lines:
            draw.text((left, top - 3 - LINE), title, font=font(13), fill=SOFT, anchor="ld")
        row.paste(picture, (left, top))
        left += step
    return row


def draw_legend(class_names: Sequence[str], width: int) -> Image.Image:
    """Draw the colours and names of the classes in as many lines as they need."""
    swatch, places = 12, []
    x, y = MARGIN, MARGIN
    for name in class_names:
        needed = swatch + GAP + round(font(13).getlength(name)) + 2 * MARGIN
        if x > MARGIN and x + needed > width:
            x, y = MARGIN, y + LINE
        places.append((x, y))
        x += needed
    legend = Image.new("RGB", (width, y + LINE + MARGIN), "white")
    draw = ImageDraw.Draw(legend)
    colours = label_colours(class_names)[1:].tolist()
    for name, colour, (x, y) in zip(class_names, colours, places, strict=True):
        draw.rectangle((x, y, x + swatch, y + swatch), fill=tuple(colour))
        draw.text((x + swatch + GAP, y + swatch / 2), name, font=font(13), fill=INK, anchor="lm")
    return legend
