"""Rows in a JSON file, written again after each, so that a run that was cut short goes on where it stopped."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """Rows of `path` by their keys: what was measured by this commit already is not measured again.

    facts: of the run; a row has its own "run", the number of its facts in the file's "runs".
    """

    def __init__(self, path: Path, facts: dict[str, Any]):
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": {}}
        self.rows: dict[str, Row] = found["rows"]
        self._runs: list[dict[str, Any]] = found["runs"]
        self._commit = facts["commit"]
        self._runs.append(facts)

    def has(self, key: str) -> bool:
        return key in self.rows and self._runs[self.rows[key]["run"]]["commit"] == self._commit

    def add(self, key: str, row: Row) -> None:
        """Puts the row into the file, which is whole at any time."""
        self.rows[key] = row | {"run": len(self._runs) - 1}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps({"runs": self._runs, "rows": self.rows}, indent=1) + "\n")
        os.replace(new, self._path)


def read(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], dict[str, Row]]:
    """(facts of the runs that rows are of, rows by key), of all the files."""
    runs, rows = [], {}
    for path in paths:
        found = json.loads(path.read_text())
        used = sorted({row["run"] for row in found["rows"].values()})
        runs += [found["runs"][number] for number in used]
        rows |= found["rows"]
    return runs, rows
