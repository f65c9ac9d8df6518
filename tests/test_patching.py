"""What every test relies on: one thread, no hub, and no replaced function that outlives its test."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from patching import PatchOfImported


def test_one_thread_and_no_hub():
    assert torch.get_num_threads() == 1
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def outlives(patch: pytest.MonkeyPatch, package) -> bool:
    """Whether a module that imports a function while it is replaced keeps the replacement."""
    patch.setattr(importlib.import_module(f"{package.__name__}.first"), "made", lambda: "replaced")
    second = importlib.import_module(f"{package.__name__}.second")
    patch.undo()
    return second.made() == "replaced"


@pytest.mark.parametrize(("kind", "kept"), [(PatchOfImported, False), (pytest.MonkeyPatch, True)])
def test_no_replacement_outlives_its_test(kind, kept, tmp_path, monkeypatch):
    name = f"package_{kind.__name__}".lower()
    (tmp_path / name).mkdir()
    for module, content in (
        ("__init__", ""),
        ("first", "def made():\n    return 'own'\n"),
        ("second", f"from {name}.first import made\n"),
    ):
        (tmp_path / name / f"{module}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    package = importlib.import_module(name)
    patch = kind()
    patch.package = package
    assert outlives(patch, package) == kept
