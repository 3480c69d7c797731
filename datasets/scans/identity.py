"""Whether the name of a DICOM folder tells who the patient is, and a name that does not.

Names of results stand in file names, tables and titles of pictures, which are shared more freely
than scans.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping

from datasets.scans.dicom_tags import SERIES
from datasets.scans.series_header import BIRTH_DATE, IDENTITY_REMOVED, PATIENT_ID, PATIENT_NAME

SHORTEST = 3  # letters and digits of a part of a name that can be recognised
# Words, with a number or without, that stand in the tags of scans without identity.
NOBODY = re.compile(
    r"(anon|anonym\w*|patient|pat|subject|subj|case|phantom|test|unknown|name|none|null|"
    r"deidentified|removed|series)\d*"
)
SPELLED = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue"})


def names_patient(name: str, tags: Mapping[int, str]) -> bool:
    """Return whether a name holds a part of the patient's name, the ID or the date of birth.

    Case, accents and separators do not matter.

    Args:
        name: path of a DICOM folder below the input, or its last part.
        tags: of a slice, see `series_tags`.
    """
    if tags.get(IDENTITY_REMOVED, "").upper() == "YES":
        return False
    known = _dates("".join(_words(tags.get(BIRTH_DATE, ""))))
    for tag in (PATIENT_NAME, PATIENT_ID):
        for text in (tags.get(tag, ""), tags.get(tag, "").translate(SPELLED)):
            words = _words(text)
            if not NOBODY.fullmatch("".join(words)):
                known |= {*words, "".join(words)}
    joined = {"".join(_words(name)), "".join(_words(name.translate(SPELLED)))}
    telling = [word for word in known if len(word) >= SHORTEST and not NOBODY.fullmatch(word)]
    return any(word in text for word in telling for text in joined)


def short_name(name: str, tags: Mapping[int, str]) -> str:
    """Return `series_` and 8 hexadecimal digits, which depend only on the series.

    Args:
        name: stands for the series if its UID is missing.
    """
    uid = tags.get(SERIES) or name
    return f"series_{hashlib.sha256(uid.encode()).hexdigest()[-8:]}"


def _words(text: str) -> list[str]:
    """Split a text into runs of letters and digits, in small letters without accents."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.findall(r"[^\W_]+", plain)


def _dates(date: str) -> set[str]:
    """Return the usual spellings of a date YYYYMMDD, without separators."""
    if not re.fullmatch(r"\d{8}", date):
        return set()
    year, month, day = date[:4], date[4:6], date[6:]
    long = {year + month + day, day + month + year, month + day + year}
    return long | {year[2:] + month + day, day + month + year[2:], month + day + year[2:]}
