"""Which files of an output folder the programs wrote, known by their content.

A file that the user made there, or corrected since, is not replaced without being asked to.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from common.errors import InputError, cannot_write, first_few
from common.files import parse_json, sha256_of
from common.writing import before_rename, flush_folder

JOURNAL = ".written.jsonl"  # one line for each file: its name in the folder and its SHA-256


class Written:
    """The files that the programs wrote into a folder, in this run and in earlier ones.

    Each file is noted before it gets its name, so that a killed run leaves no file unknown. Lines
    are only added, so several processes may write into the same folder.

    Args:
        folder: output folder, which need not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.known: dict[str, set[str]] = {}  # each name in the folder, with its SHA-256s
        self.read()

    def read(self) -> None:
        """Learn what the folder's journal tells now, also of other processes."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            lines = (self.folder / JOURNAL).read_text("utf-8", errors="replace").splitlines()
            for line in filter(None, lines):
                with contextlib.suppress(ValueError, TypeError):  # cut short by a full disk
                    name, digest = parse_json(line)
                    # Anybody may have written the journal, and files that it names are deleted.
                    path = PurePosixPath(str(name))
                    if not path.is_absolute() and ".." not in path.parts:
                        self._know(str(name), str(digest))

    def wrote(self, name: str) -> bool:
        """Return whether the file of this name is as the programs wrote it."""
        path = self.folder / name
        return name in self.known and path.is_file() and sha256_of(path) in self.known[name]

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Return which of these names are taken by what the programs did not write."""
        present = (name for name in names if os.path.lexists(self.folder / name))
        return [name for name in present if not self.wrote(name)]

    def refuse_foreign(
        self,
        names: Iterable[str],
        *,
        flag: str,
        remedy: str = "choose another folder, move these files away, or pass --overwrite to "
        "replace them",
    ) -> None:
        """Raise an `InputError` if writing these files would replace what the user has.

        Args:
            names: relative to the folder.
            flag: names the folder, as `--output`.
            remedy: what the user can do.
        """
        names = list(names)
        foreign = self.foreign(names)
        for _ in range(3):  # Another process may have written some of them since the journal was
            foreign = foreign and Written(self.folder).foreign(foreign)  # read, or this moment.
        if foreign:
            raise InputError(
                f"{flag} {self.folder} holds {first_few(foreign)}, which this program has not "
                f"written or which was changed since; {remedy}"
            )

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note every file that `atomic_path` puts into the folder meanwhile, in any thread."""
        before_rename.append(self.note)
        try:
            yield
        finally:
            before_rename.remove(self.note)

    def log_file(self, name: str) -> Path:
        """Return the path of a log, which programs only add to; note a new one as theirs."""
        path = self.folder / name
        if name not in self.known:  # noted first, so that no other process takes it for foreign
            self.note(path if path.exists() else Path(os.devnull), path)
            path.open("ab").close()
        return path

    def note(self, content: Path, path: Path) -> None:
        """Note that the file `path` of the folder holds what the file `content` holds now."""
        if not path.is_relative_to(self.folder):
            return
        name, digest = path.relative_to(self.folder).as_posix(), sha256_of(content)
        if digest in self.known.get(name, ()):
            return
        journal = self.folder / JOURNAL
        try:
            is_new = not journal.exists()
            with journal.open("ab") as file:
                # The line before may lack its end.
                file.write(f"\n{json.dumps([name, digest])}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            if is_new:
                flush_folder(self.folder)
        except OSError as error:
            raise cannot_write(journal, error) from None
        self._know(name, digest)

    def _know(self, name: str, digest: str) -> None:
        self.known.setdefault(name, set()).add(digest)
