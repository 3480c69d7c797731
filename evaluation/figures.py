"""Draw the pages of pictures of a test run: scores of each organ, overlays of each case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from datasets.colours import label_colours
from evaluation.charts import draw_scores, save
from evaluation.overlays import CasePanel
from evaluation.tables import CaseResult, case_means
from evaluation.views import SHOWN_SIDE, font, framed, save_picture, slice_title

CASES_A_PAGE = 6
WIDEST = 4096  # pixels; pictures of more than 682 px shrink where a case shows three slices
MARGIN, GAP, LINE, HEADING = 10, 6, 20, 26  # pixels
INK, SOFT = "#1c2530", "#5c6875"


def write_pages(
    folder: Path,
    panels: Sequence[CasePanel],
    results: Sequence[CaseResult],
    class_names: Sequence[str],
) -> list[Path]:
    """Write `dsc_per_organ.png` and `overlays.png`, or `overlays_1.png` … for many cases."""
    pages = [folder / "dsc_per_organ.png"]
    save(draw_scores(results, class_names), pages[0])
    means = [row["dsc"] for row in case_means(results)]
    captions = ["no organ" if dsc is None else f"mean DSC {100 * dsc:.1f} %" for dsc in means]
    starts = range(0, len(panels), CASES_A_PAGE)
    for number, start in enumerate(starts, start=1):
        shown = slice(start, start + CASES_A_PAGE)
        name = "overlays.png" if len(starts) == 1 else f"overlays_{number}.png"
        picture = draw_overlays(panels[shown], captions[shown], class_names)
        save_picture(picture, folder / name)
        pages.append(folder / name)
    return pages


def draw_overlays(
    panels: Sequence[CasePanel],
    captions: Sequence[str],
    class_names: Sequence[str],
    kinds: tuple[str, str] = ("truth", "prediction"),
) -> Image.Image:
    """Draw one row for each case: two pictures of each slice side by side, a caption above."""
    columns = 2 * max(len(panel.slices) for panel in panels)
    longest = min(SHOWN_SIDE[1], (WIDEST - 2 * MARGIN) // columns - GAP)
    rows = [
        draw_case(panel, caption, kinds, longest)
        for panel, caption in zip(panels, captions, strict=True)
    ]
    width = max(row.width for row in rows)
    parts = [*rows, draw_legend(class_names, width)]
    page = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        page.paste(part, (0, top))
        top += part.height
    return page


def draw_case(panel: CasePanel, caption: str, kinds: tuple[str, str], longest: int) -> Image.Image:
    """Draw the slices of one case in a row, its name and caption above them."""
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
