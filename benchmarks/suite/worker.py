"""The process of one part: writes its results into a file as they grow.

python -m benchmarks.suite.worker PART FOUND.json RESULT.json full|tiny
"""

import functools
import importlib
import json
import os
import pathlib
import sys
from typing import Any

from benchmarks import report, suite
from benchmarks.suite import scale


def main(name: str, found_file: str, result_file: str, size: str) -> None:
    """Runs a part."""
    part, result = suite.PARTS[name], pathlib.Path(result_file)
    found = json.loads(pathlib.Path(found_file).read_text())
    module = importlib.import_module(f"benchmarks.suite.{part.module}")
    run: Any = module.run
    if part.preset is not None:
        run = functools.partial(run, preset=part.preset)
    for results in run({"full": scale.full, "tiny": scale.tiny}[size](), found):
        if part.module != "transformers_peer":  # whose process leaves the GPU to it
            results = results | {"machine": report.this_machine()}
        written = result.with_suffix(".new")
        written.write_text(json.dumps(results))
        os.replace(written, result)  # whole, or as it was


if __name__ == "__main__":
    main(*sys.argv[1:])
