"""A small part of both campaigns, in one process: its imports and the hosts that it makes serve both.

python tests/faults/part.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import disk
import kills
from runs import prepare


def main() -> None:
    """Print the summaries by campaign as JSON; what goes on is on stderr."""
    with tempfile.TemporaryDirectory(prefix="uhl-faults-") as folder:
        root = Path(folder).resolve()
        prepare(root)
        print(json.dumps({"kills": kills.campaign(5, 0, root), "disk": disk.campaign(root, 1, 0)}))


if __name__ == "__main__":
    main()
