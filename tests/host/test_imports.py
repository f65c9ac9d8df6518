"""The package itself is light: commands that load no host need no torch."""

import subprocess
import sys

LIGHT = ("uhl_cli.host", "uhl_cli.host.builtin", "uhl_cli.formats.task")


def test_light_modules_import_no_torch():
    code = f"import sys, {', '.join(LIGHT)}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
