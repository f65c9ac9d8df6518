"""Small data and hosts for comparisons."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_hosts import SENTENCES, save_tiny_host

TASKS = ("sst2", "conll2003", "boolq", "amazon")


def write_data_sets(folder: Path) -> dict[str, str]:
    """A small data set of every shipped task, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"{sentence} {index}" for index, sentence in enumerate(SENTENCES * 4)]
    for part, count in (("train", 72), ("dev", 24)):
        rows = [(text, index % 2) for index, text in enumerate(texts[:count])]
        sst2 = "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
        amazon = "label\ttitle\ttext\n" + "".join(f"{label}\tA title\t{text}\n" for text, label in rows)
        for name, content in (("sst2", sst2), ("amazon", amazon)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{part}.tsv").write_text(content)
        (folder / "boolq").mkdir(exist_ok=True)
        lines = [{"question": "is it so", "passage": text, "answer": bool(label)} for text, label in rows]
        (folder / "boolq" / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "conll2003").mkdir(exist_ok=True)
        name = "train.txt" if part == "train" else "valid.txt"
        sentences = []
        for text, _ in rows:
            words = text.split()
            tags = ["B-PER" if word[0].isupper() else "O" for word in words]
            sentences.append("".join(f"{word} NN B-NP {tag}\n" for word, tag in zip(words, tags, strict=True)))
        (folder / "conll2003" / name).write_text("-DOCSTART- -X- O O\n\n" + "\n".join(sentences) + "\n")
    return {name: str(folder / name) for name in TASKS}


def write_hosts(folder: Path, names: dict[str, str]) -> dict[str, str]:
    """A tiny host of its family for every name, wide enough to carry an adapter within 10 % of its FLOPs."""
    made = {}
    for index, (name, family) in enumerate(names.items()):
        place = folder / name.replace("/", "-")
        save_tiny_host(place, family, hidden_size=128 + 16 * index, num_hidden_layers=2, seed=index)
        made[name] = str(place)
    return made


def at(places: dict[str, str]) -> list[str]:
    """`--at` options of these places."""
    return [word for name, path in places.items() for word in ("--at", f"{name}={path}")]
