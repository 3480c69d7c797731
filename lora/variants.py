"""The LoRA variants: files beside the published ones that define a class `LoRA_Sam`.

An adapter or a config.json may name a variant. Such a name must not run code from anywhere else, so
a file is looked up by its name in one folder and read before it is imported.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from common.errors import InputError, first_line

CLASS = "LoRA_Sam"
# Where variants lie: the top folder of the project, which `import` searches first.
FOLDERS = (Path(__file__).resolve().parent.parent,)
EXPECTED = (
    "expected sam_lora_image_encoder, sam_lora_image_encoder_mask_decoder or a module of your own "
    "beside them"
)


def variant_file(name: str) -> Path:
    """Return the file of the variant that `--module` names, without running anything in it.

    Raises:
        InputError: there is no such file in the top folder, or it does not define the class.
    """
    path = {file.stem: file for folder in FOLDERS for file in folder.glob("*.py")}.get(name)
    if path is None:
        raise InputError(f"--module {ascii(name)[1:-1]:.80} does not exist; {EXPECTED}")
    if not path.is_file() or path.resolve().parent not in FOLDERS:
        raise InputError(f"--module {name} is no file in {path.parent} itself; put the file there")
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"--module {name}: {path} is not Python ({first_line(error)})") from None
    if CLASS not in {defined for statement in statements for defined in _defined(statement)}:
        raise InputError(f"--module {name} has no class {CLASS}; {EXPECTED}")
    return path


def load_variant(name: str) -> type:
    """Return the class of the variant that `--module` names.

    Raises:
        InputError: it is no variant (`variant_file`), or Python has another module of this name.
    """
    path = variant_file(name)
    module = sys.modules.get(name)
    if module is None:
        module = _run(name, path)
    elif Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise InputError(
            f"--module {name} has the name of a module of Python or of a library; rename {path}"
        )
    return getattr(module, CLASS)


def _run(name: str, path: Path) -> ModuleType:
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
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
