"""JSON files that hold an object, as models' folders have them."""

import json
import pathlib
from typing import Any


def read_object(file: pathlib.Path, error: type[ValueError]) -> dict[str, Any]:
    """What a file holds; {} where there is no such file.

    Raises:
      error: if it is no JSON, or no object; with the file's name.
    """
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as reason:
        raise error(f"{file}: {reason}") from reason
    if not isinstance(values, dict):
        raise error(f"{file}: must hold a JSON object")
    return values
