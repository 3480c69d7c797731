"""The result of a table of ablations: every row over its seeds, beside the base row.

`summarise` reads the run folders, `write` leaves the tables, the plot and the page. Cells that are
missing, failed or were tested on other data are listed and never averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ablation.chart import draw_rows
from ablation.differences import difference_of, same_data
from ablation.formats import as_json, as_markdown, as_rows
from ablation.measured import REPORT, progress_of, read_cost, read_tested
from ablation.page import page_of
from ablation.published import read_published
from ablation.summary import SCORES, CellResult, RowResult, Summary, data_name
from ablation.table import Cell, Table
from common.errors import InputError, MissingFileError, first_few
from common.names import write_table
from common.writing import remove_partials, write_json, write_text
from common.written import Written
from evaluation.charts import save
from evaluation.tables import total_means

FILES = ("table.csv", "table.md", "table.json", "plot.png", "index.html")


def summarise(table: Table, output: Path, failed: Mapping[str, str]) -> Summary:
    """Read what the cells of a table have left; cells that are not finished are listed.

    Args:
        output: holds the run folders.
        failed: one sentence for each cell whose results do not count, by its name.
    """
    output, published = Path(output), read_published()
    cells = {cell.name: _read_cell(cell, output, failed.get(cell.name)) for cell in table.cells}
    _leave_out_other_data(table, cells)
    rows = []
    for row in table.rows:
        of_row = [cells[cell.name] for cell in table.cells if cell.row is row]
        rows.append(RowResult(row, of_row, published.get(row.published or "")))
    base = next(row for row in rows if row.row.name == table.base)
    for row in rows:
        if row is not base:
            found = {score: difference_of(base.tests, row.tests, score) for score in SCORES}
            row.differences.update({score: one for score, one in found.items() if one is not None})
    return Summary(table, rows, list(_notes(rows)))


def _read_cell(cell: Cell, output: Path, failure: str | None) -> CellResult:
    folder = output / cell.name
    missing = failure
    if failure is None:
        try:
            test = read_tested(folder)
        except MissingFileError:
            missing = progress_of(folder)
        except InputError as error:
            missing = str(error)
        else:
            report = f"{cell.name}/{REPORT.as_posix()}" if (folder / REPORT).is_file() else None
            cost = read_cost(folder, test)
            return CellResult(cell, test, cost, total_means(test.results), None, report)
    return CellResult(cell, None, None, {}, missing, None)


def _leave_out_other_data(table: Table, cells: dict[str, CellResult]) -> None:
    """Take the results of those cells away that were tested on other data than the first cell.

    The first is a cell of the base row, if one has results.
    """
    done = [cell for cell in cells.values() if cell.test is not None]
    done.sort(key=lambda cell: cell.cell.row.name != table.base)
    for cell in done[1:]:
        try:
            same_data(done[0].test, cell.test)
        except InputError as error:
            why = f"left out, because of other test data: {error}"
            cells[cell.cell.name] = CellResult(cell.cell, None, None, {}, why, cell.report)


def _notes(rows: Sequence[RowResult]) -> Iterator[str]:
    """Yield what makes numbers of the table hard to compare."""
    done = [cell for row in rows for cell in row.done]
    if not done:
        return
    test, known = done[0].test, next((row.published for row in rows if row.published), None)
    data = data_name(test)
    if known and (data, len(test.results)) != (known.data, known.cases):
        yield (
            f"The published numbers are of the {known.cases} test cases of {known.data}; these "
            f"runs were tested on {len(test.results)} of {data or 'unknown data'}, so the two do "
            "not compare."
        )
    counts = {row.row.name: len(row.done) for row in rows}
    if len(set(counts.values())) > 1:
        yield (
            "Rows have different numbers of finished seeds, so their means are over different "
            "seeds; the differences use the seeds that both rows have."
        )
    for name, what in (
        ("device", "devices, so seconds and memory do not compare"),
        ("commit", "versions of the code"),
    ):
        found = sorted({getattr(cell.cost, name) for cell in done} - {None})
        if len(found) > 1:
            yield f"The runs were trained by different {what}: {first_few(found)}."
    if any(set(row.score("hd95_voxels").by_seed) != set(row.tests) for row in rows):
        yield "Runs without any organ in both label and prediction have no HD95."


def refuse_foreign(output: Path) -> None:
    """Refuse a folder with files of the names of `FILES` that no program of this project wrote.

    Raises:
        InputError: there is one, or one that was changed since.
    """
    remedy = "move these files away, or choose another folder"
    Written(output).refuse_foreign(FILES, flag="--output", remedy=remedy)


def write(summary: Summary, output: Path) -> list[Path]:
    """Write the result into the folder of the runs; return the paths of the files.

    Raises:
        InputError: see `refuse_foreign`.
    """
    refuse_foreign(output)
    written = Written(output)
    remove_partials(written.folder)
    paths = [written.folder / name for name in FILES]
    table, markdown, everything, plot, page = paths
    with written.noting():
        write_table(table, as_rows(summary))
        write_text(markdown, as_markdown(summary))
        write_json(everything, as_json(summary))
        save(draw_rows(summary, ("dsc", summary.distance)), plot)
        write_text(page, page_of(summary))
    return paths
