"""What the builtin hosts are worth: LoRA r8 on SST-2 and on `reviews`, beside MiniLM and bags of words.

    python tests/benchmarks/builtin_hosts.py --shared SHARED --output tests/benchmarks/results/builtin_hosts.json

Each host is adapted by rank-8 LoRA for 500 steps of 32 (see `lora`), with `--seeds` seeds; the learning rate is chosen
on training data in shorter runs.  Bags of words are logistic regressions on tf-idf of words, and of words and pairs of
words, their strength chosen by cross-validation on the training data.  Scores are accuracies on the whole dev set.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lora import LoraSettings, choose_learning_rate, predict, train_lora
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline

from uhl_cli.data import TaskData, load_task
from uhl_cli.host.builtin import builtin_names
from uhl_cli.metrics import score


def bag_of_words(data: TaskData, longest: int) -> list[int]:
    """Predictions of the best tf-idf regression on groups of up to `longest` words."""
    steps = [
        ("tf", TfidfVectorizer(ngram_range=(1, longest), sublinear_tf=True)),
        ("lr", LogisticRegression(max_iter=2000)),
    ]
    search = GridSearchCV(Pipeline(steps), {"lr__C": [0.3, 1, 3, 10, 30], "tf__min_df": [1, 2]}, cv=5)
    search.fit(list(data.train.texts), list(data.train.labels))
    return search.predict(list(data.evaluation.texts)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/sst2 and hosts/; without it only `reviews`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["reviews", "sst2"])
    parser.add_argument("--hosts", nargs="+", default=[*(f"builtin:{name}" for name in builtin_names()), "minilm-l6"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--search-steps", type=int, default=200, help="length of the runs that choose a learning rate")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text())["results"] if arguments.output.exists() else {}
    for task in arguments.tasks:
        where = None if task == "reviews" else str(arguments.shared / "data" / task)
        data = load_task(task, data=where)
        labels, references = data.task.labels, list(data.evaluation.labels)

        def record(name: str, rows: list[int], **more: object) -> None:
            found = score("accuracy", rows, references, labels)  # noqa: B023 - called in this turn of the loop only
            results[name] = {**found.model_dump(), **more}
            print(f"{name}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] {more}", file=sys.stderr, flush=True)
            content = {"steps": arguments.steps, "results": results}
            arguments.output.write_text(json.dumps(content, indent=1) + "\n")

        if task == "reviews":
            for longest in (1, 2):
                record(f"{task}/bag of {'words' if longest == 1 else 'words and pairs'}", bag_of_words(data, longest))
        for host in arguments.hosts:
            path = host if host.startswith("builtin:") else str(arguments.shared / "hosts" / host)
            rate = choose_learning_rate(path, data.train, len(labels), steps=arguments.search_steps)
            for seed in range(arguments.seeds):
                settings = LoraSettings(rate, steps=arguments.steps, seed=seed)
                model = train_lora(path, data.train, len(labels), settings)
                record(f"{task}/{host}/lora/seed-{seed}", predict(model, data.evaluation), learning_rate=rate)


if __name__ == "__main__":
    main()
