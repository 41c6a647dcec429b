"""Functions from users' files, named in a config as ``file.py:function``."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_function(spec: str, base_folder: str | Path = ".") -> Callable[..., Any]:
    """Import the file in ``spec`` and return its function. The file runs once per call.

    Args:
        spec: ``file.py:function``; a relative file starts from ``base_folder``.

    Raises:
        ValueError: ``spec`` has another form, the file or the name does not exist, or the name is
            not callable. Errors of the file itself pass through.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"Cannot read {spec!r}: name a function as file.py:function")
    path = (Path(base_folder) / file).resolve()
    if not path.is_file():
        raise ValueError(f"No file {path}, which {spec!r} names, relative to {base_folder}")
    module_name = f"kimi_core.plugins:{path}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None  # It is None for names that do not end in .py.
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses look up their module there.
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        found = ", ".join(n for n, value in vars(module).items() if callable(value) and n[0] != "_")
        raise ValueError(f"{path} has no {name!r}; it has {found or 'no functions'}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{spec} is {function!r}, which is not callable; name a function")
    return function
