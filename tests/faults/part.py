"""A small part of both campaigns, in one process: its imports and the hosts that it makes serve both.

python tests/faults/part.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import disk
import kills
from runs import prepare


def main() -> NoReturn:
    """Print the summaries by campaign as JSON; what goes on is on stderr.  Exit code 1 with problems."""
    with tempfile.TemporaryDirectory(prefix="uhl-faults-") as folder:
        root = Path(folder).resolve()
        prepare(root)
        summaries = {"kills": kills.campaign(5, 0, root), "disk": disk.campaign(root, 1, 0)}
    print(json.dumps(summaries))
    sys.exit(any(summary["problems"] for summary in summaries.values()))


if __name__ == "__main__":
    main()
