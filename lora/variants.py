"""The LoRA variants: files beside the published ones that define a class `LoRA_Sam`.

An adapter or a config.json may name a variant. Such a name must not run code from anywhere else, so
a file is looked up by its name in the folders that the user trusts, and read before it is imported.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType

from common.errors import InputError, first_line

CLASS = "LoRA_Sam"
# Where variants lie: the top folder of the project, which `import` searches first.
FOLDERS = (Path(__file__).resolve().parent.parent,)
# Environment variable: a folder of the user with more of them, for a project that pip installed.
# The current folder is never searched: it may hold the data and adapters of others.
OWN_FOLDER = "SAMED_VARIANTS"
SAMED, SAMED_S = "sam_lora_image_encoder", "sam_lora_image_encoder_mask_decoder"
EXPECTED = (
    f"expected {SAMED}, {SAMED_S} or a module of your own, beside them or in the folder that the "
    f"environment variable {OWN_FOLDER} names"
)
# Arguments of a variant besides the network and the rank, and the flags that set them.
KEYWORDS = {"targets": "--lora_targets", "lora_layer": "--lora_blocks"}


def variant_file(name: str) -> Path:
    """Return the file of the variant that `--module` names, without running anything in it.

    Raises:
        InputError: there is no such file in these folders, or in two of them, or it does not define
            the class.
    """
    folders = _folders()
    found = [file for folder in folders for file in folder.glob("*.py") if file.stem == name]
    if not found:
        raise InputError(f"--module {ascii(name)[1:-1]:.80} does not exist; {EXPECTED}")
    path = found[0]
    if len(found) > 1:
        raise InputError(f"--module {name} is {path} and also {found[1]}; rename your own file")
    if not path.is_file() or path.resolve().parent not in folders:
        raise InputError(f"--module {name} is no file in {path.parent} itself; put the file there")
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"--module {name}: {path} is not Python ({first_line(error)})") from None
    if CLASS not in {defined for statement in statements for defined in _defined(statement)}:
        raise InputError(f"--module {name} has no class {CLASS}; {EXPECTED}")
    return path


def _folders() -> tuple[Path, ...]:
    """Return the folders that are searched, without doubles."""
    given = os.environ.get(OWN_FOLDER)
    if not given:
        return FOLDERS
    if not Path(given).is_dir():
        raise InputError(
            f"the environment variable {OWN_FOLDER} is {given!a:.200}, which is no folder; set it "
            "to the folder of your LoRA variants, or unset it"
        )
    return tuple(dict.fromkeys((*FOLDERS, Path(given).resolve())))


def load_variant(name: str, keywords: Iterable[str] = ()) -> type:
    """Return the class of the variant that `--module` names.

    Args:
        keywords: those of `KEYWORDS` that it will be called with.

    Raises:
        InputError: it is no variant (`variant_file`), Python has another module of this name, or
            the class does not take a keyword.
    """
    path = variant_file(name)
    module = sys.modules.get(name)
    if module is None:
        module = _run(name, path)
    elif Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise InputError(
            f"--module {name} has the name of a module of Python or of a library; rename {path}"
        )
    variant = getattr(module, CLASS)
    parameters = signature(variant).parameters if keywords else {}
    takes_any = any(found.kind is Parameter.VAR_KEYWORD for found in parameters.values())
    for keyword in keywords:
        if keyword not in parameters and not takes_any:
            raise InputError(
                f"{KEYWORDS[keyword]} has no effect on --module {name}, whose {CLASS} takes no "
                f"{keyword}=; leave the flag out, or let the class take it ({SAMED}.py shows how)"
            )
    return variant


def _run(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    # What it imports from beside itself is found last, and so hides nothing.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    # Known by its name while it runs, as after an import, so that it runs only once.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _defined(statement: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a file defines, other than by an import."""
    if isinstance(statement, ast.ClassDef):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
