"""BERTScore (Zhang et al. 2020) of captions, through the package bert-score."""
from pathlib import Path

from tqdm import tqdm

from captioning.errors import InputError

CHUNK = 512         # captions at once: bert-score keeps the features of all words of a call


def bert_score(captions, references, model, layer=None, device="cpu"):
    """F_BERT of each caption with the reference that it fits best, without idf or rescaling -> a list.

    model: a name on the hub or a local folder; layer: whose features count, by default the one that bert-score chose
    for the model's name, else the last. A caption without words has 0, and one whose references all have none.
    """
    try:
        from bert.bertscore import BERTScorer
    except ImportError as error:
        raise InputError(f"BERTScore is not installed ({error}): pip install -r bert/requirements.txt") from error
    scorer = load(BERTScorer, str(model), layer, device)
    scores = [0.0] * len(captions)
    references = [[text for text in sentences if text.strip()] for sentences in references]
    whole = [i for i, caption in enumerate(captions) if caption.strip() and references[i]]
    for start in tqdm(range(0, len(whole), CHUNK), desc="BERTScore", unit=f"{CHUNK} captions"):
        chosen = whole[start:start + CHUNK]
        _, _, best = scorer.score([captions[i] for i in chosen], [references[i] for i in chosen])
        for i, value in zip(chosen, best.tolist(), strict=True):
            scores[i] = value
    return scores


def load(scorer_class, model, layer, device):
    """bert-score's scorer with the tokens that its published scores were made with."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(model)
        layer = layer or model2layers.get(model) or model2layers.get(Path(model).name) or config.num_hidden_layers
        scorer = scorer_class(model_type=model, num_layers=layer, device=str(device))
        # transformers 5 ignores the prefix space that bert-score asks RoBERTa's tokeniser for
        tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
    except Exception as error:      # of any kind: transformers reads what the folder holds
        raise InputError(f"the model {model} of --bert_model cannot be loaded ({str(error).splitlines()[0]}): give a "
                         "model of the hub where the network allows, or a local folder") from error
    # a folder's tokeniser may not know how long its model's sentences are; RoBERTa's positions start at 2
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings - 2)
    scorer._tokenizer = tokenizer
    return scorer
