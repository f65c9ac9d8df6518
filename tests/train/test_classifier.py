"""A classifier of the user's own says what transformers and peft say, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_classifiers import save, tiny_classifier, with_lora
from tiny_hosts import SENTENCES, save_tiny_host, tiny_tokenizer

from uhl_cli.data.examples import Examples, token_examples
from uhl_cli.errors import HostError, HostNotFoundError
from uhl_cli.train.classifier import load_classifier

LABELS = ("bad", "fair", "good")
TEXTS = ("It was warm.", *SENTENCES[:9])
EXAMPLES = Examples(TEXTS, labels=(0,) * len(TEXTS))


def said(model: torch.nn.Module, family: str, *text: str) -> torch.Tensor:
    """What the model says of one text alone, as its user asks it."""
    batch = tiny_tokenizer(family)(*text, return_tensors="pt")
    if family != "bert":
        batch.pop("token_type_ids", None)
    with torch.inference_mode():
        return model(**batch).logits[0]


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
def test_logits_are_the_models_own_one_text_at_a_time(family, tmp_path):
    model = tiny_classifier(family, LABELS)
    path = save(tmp_path / "mine", family, model)
    state = torch.random.get_rng_state()
    loaded = load_classifier(str(path), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (loaded.name, loaded.kind, loaded.labels, loaded.named) == ("mine", "sequence", LABELS, True)
    assert loaded.base_name == str(path)
    done = []
    found = loaded.logits_of(EXAMPLES, batch_size=4, progress=lambda *at: done.append(at))
    model.config.pad_token_id = None  # of one text alone, the last token is the last
    for text, logits in zip(TEXTS, found, strict=True):
        assert logits.shape == (1, 3)
        torch.testing.assert_close(logits[0], said(model, family, text), rtol=1e-4, atol=1e-4)
    assert done == [(4, 10), (8, 10), (10, 10)]
    assert not torch.allclose(found[0], found[1], atol=1e-2), "the model says the same of everything"


def test_pairs_are_read_as_pairs(tmp_path):
    model = tiny_classifier("bert", LABELS)
    loaded = load_classifier(str(save(tmp_path / "mine", "bert", model)), device="cpu")
    pairs = tuple(reversed(TEXTS))
    found = loaded.logits_of(Examples(TEXTS, pairs, labels=(0,) * len(TEXTS)))
    for first, second, logits in zip(TEXTS, pairs, found, strict=True):
        torch.testing.assert_close(logits[0], said(model, "bert", first, second), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_an_empty_text_spoils_no_other(family, tmp_path):
    loaded = load_classifier(str(save(tmp_path / "mine", family, tiny_classifier(family, LABELS))), device="cpu")
    alone = loaded.logits_of(EXAMPLES.select([0]))[0]
    both = loaded.logits_of(Examples((TEXTS[0], ""), labels=(0, 0)))
    torch.testing.assert_close(both[0], alone, rtol=1e-4, atol=1e-4)
    assert both[1].isfinite().all()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_word_has_the_logits_of_its_first_sub_token(family, tmp_path):
    model = tiny_classifier(family, ("O", "B-PER", "I-PER"), "tokens")
    loaded = load_classifier(str(save(tmp_path / "mine", family, model)), device="cpu")
    assert loaded.kind == "tokens"
    words = [text.split() for text in TEXTS]
    examples = token_examples(words, [[0] * len(row) for row in words])
    found, several = loaded.logits_of(examples, batch_size=3), 0
    for row, logits in zip(words, found, strict=True):
        batch = loaded.tokenizer(row, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            whole = model(batch["input_ids"]).logits[0]
        ids = batch.word_ids()
        first = [ids.index(word) for word in range(len(row))]
        several += sum(ids.count(word) > 1 for word in range(len(row)))
        torch.testing.assert_close(logits, whole[first], rtol=1e-4, atol=1e-4)
    assert several > 5, "no word of several sub-tokens, so nothing was shown"


def test_a_sentence_without_words_spoils_no_other(tmp_path):
    model = tiny_classifier("bert", ("O", "B-PER"), "tokens")
    loaded = load_classifier(str(save(tmp_path / "mine", "bert", model)), device="cpu")
    alone, both = (
        loaded.logits_of(token_examples(rows, [[0] * len(row) for row in rows]))
        for rows in ([["a", "b"]], [["a", "b"], []])
    )
    torch.testing.assert_close(both[0], alone[0], rtol=1e-4, atol=1e-4)
    assert both[1].shape == (0, 2)


def test_a_word_that_was_cut_off_favours_no_class(tmp_path):
    model = tiny_classifier("bert", ("O", "B-PER"), "tokens")
    loaded = load_classifier(str(save(tmp_path / "mine", "bert", model)), device="cpu")
    words = SENTENCES[0].split()
    found = loaded.logits_of(token_examples([words], [[0] * len(words)]), max_length=6)[0]
    assert found.shape == (len(words), 2)
    assert (found[-1] == 0).all()
    assert (found[0] != 0).all()


@pytest.mark.parametrize("kind", ["sequence", "tokens"])
def test_a_peft_folder_is_read_on_its_base_with_its_own_head(kind, tmp_path):
    base = save_tiny_host(tmp_path / "base", "bert")
    plain = tiny_classifier("bert", LABELS, kind)
    wanted = with_lora(plain, kind, modules_to_save=["classifier", "pooler"] if kind == "sequence" else None)
    wanted.peft_config["default"].base_model_name_or_path = str(base)
    wanted.save_pretrained(tmp_path / "lora")
    loaded = load_classifier(str(tmp_path / "lora"), device="cpu")
    assert (loaded.name, loaded.kind, loaded.base_name) == ("lora", kind, str(base))
    assert (loaded.labels, loaded.named) == (("LABEL_0", "LABEL_1", "LABEL_2"), False)
    batch = tiny_tokenizer("bert")([TEXTS[1]], return_tensors="pt")
    with torch.inference_mode():
        ours, theirs = loaded.model(**batch).logits, wanted(**batch).logits
        with wanted.disable_adapter():
            without = wanted(**batch).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, without, atol=1e-2), "the LoRA does nothing, so nothing was shown"
    # Labels stand in a config.json beside it, if there is one.
    (tmp_path / "lora" / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    again = load_classifier(str(tmp_path / "lora"), device="cpu")
    assert (again.labels, again.named) == (LABELS, True)


def test_a_lora_on_a_classifier_takes_the_head_and_the_labels_of_its_base(tmp_path):
    base = save(tmp_path / "base", "bert", tiny_classifier("bert", LABELS))
    model = with_lora(tiny_classifier("bert", LABELS), kind=None)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "lora")
    loaded = load_classifier(str(tmp_path / "lora"), device="cpu")
    assert (loaded.labels, loaded.named) == (LABELS, True)
    torch.testing.assert_close(loaded.logits_of(EXAMPLES)[0][0], said(model, "bert", TEXTS[0]), rtol=1e-4, atol=1e-4)


def drop(path, *names: str) -> None:
    """Leave out all weights of a file whose names hold one of these."""
    kept = {key: value for key, value in load_file(path).items() if not any(name in key for name in names)}
    assert len(kept) < len(load_file(path))
    save_file(kept, path, metadata={"format": "pt"})


def broken(tmp_path, damage: str) -> str:
    """A model that cannot teach."""
    path = tmp_path / "mine"
    if damage == "no such folder":
        return "./mine"
    if damage == "no head":
        return str(save_tiny_host(path, "bert"))
    if damage == "builtin":
        return "builtin:tiny"
    if damage.startswith("peft"):
        base = save_tiny_host(tmp_path / "base", "bert")
        model = with_lora(tiny_classifier("bert", LABELS), modules_to_save=["classifier", "pooler"])
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(path)
        config = json.loads((path / "adapter_config.json").read_text())
        if damage == "peft without head":
            drop(path / "adapter_model.safetensors", "classifier")
        elif damage == "peft without part of the head":
            drop(path / "adapter_model.safetensors", "classifier.bias")
        elif damage == "peft without factors":
            drop(path / "adapter_model.safetensors", "lora_A")
        elif damage == "peft without weights":
            (path / "adapter_model.safetensors").unlink()
        elif damage == "peft without base":
            config["base_model_name_or_path"] = str(tmp_path / "no-such-base")
        elif damage == "peft of no classification":
            config["task_type"] = "CAUSAL_LM"
        elif damage == "peft of a list of tasks":
            config["task_type"] = ["SEQ_CLS"]
        elif damage == "peft of a broken pattern":
            config["target_modules"] = "("
        elif damage == "peft of more layers":
            config["layer_replication"] = [[0, 5]]
        elif damage == "peft of another base":
            save_tiny_host(base, "bert", hidden_size=48)
        if damage == "peft of broken configuration":
            (path / "adapter_config.json").write_text("{")
        else:
            (path / "adapter_config.json").write_text(json.dumps(config))
        return str(path)
    settings = {"several labels": {"problem_type": "multi_label_classification"}}.get(damage, {})
    labels = {"regression": ("x",), "labels twice": ("same", "same")}.get(damage, LABELS)
    save(path, "bert", tiny_classifier("bert", labels, **settings))
    if damage == "fresh head":
        drop(path / "model.safetensors", "classifier")
    elif damage == "pickle":
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
    elif damage == "not finite":
        weights = load_file(path / "model.safetensors")
        save_file(weights | {"classifier.bias": weights["classifier.bias"] * torch.nan}, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("no such folder", HostNotFoundError, "no folder './mine'"),
        ("no head", HostError, "no classification head: it is a BertModel"),
        ("builtin", HostError, "no classification head"),
        ("fresh head", HostError, "lacks 2 weights"),
        ("regression", HostError, "is a regression"),
        ("several labels", HostError, "is a multi-label classification"),
        ("labels twice", HostError, "not distinct"),
        ("pickle", HostError, "pickled weights only"),
        ("peft without head", HostError, "modules_to_save"),
        ("peft without part of the head", HostError, "lack 1 weights of the head, the first is 'classifier.bias'"),
        ("peft without factors", HostError, "lacks weights"),
        ("peft without weights", HostError, "no adapter_model.safetensors"),
        ("peft without base", HostNotFoundError, "no-such-base"),
        ("peft of no classification", HostError, "for CAUSAL_LM, not for classification"),
        ("peft of a list of tasks", HostError, "not for classification"),
        ("peft of a broken pattern", HostError, "cannot be loaded"),
        ("peft of more layers", HostError, "cannot be loaded"),
        ("peft of another base", HostError, "cannot be loaded"),
        ("peft of broken configuration", HostError, "cannot be read"),
    ],
)
def test_what_is_no_whole_classifier_is_refused_in_one_line(damage, error, words, tmp_path):
    with pytest.raises(error) as caught:
        load_classifier(broken(tmp_path, damage), device="cpu", offline=True)
    assert words in str(caught.value)
    assert caught.value.hint.endswith(".")


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    loaded = load_classifier(broken(tmp_path, "not finite"), device="cpu")
    with pytest.raises(HostError, match="not finite"):
        loaded.logits_of(EXAMPLES)


def test_a_teacher_of_another_type_is_loaded(tmp_path):
    """It need not be the host: `--host` names another then."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=200,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        id2label={0: "a", 1: "b"},
    )
    loaded = load_classifier(
        str(save(tmp_path / "mine", "bert", AlbertForSequenceClassification(config))), device="cpu"
    )
    assert loaded.labels == ("a", "b")
    assert len(loaded.logits_of(EXAMPLES)) == len(TEXTS)
