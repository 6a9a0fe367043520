"""BERTScore (Zhang et al. 2020) of captions, computed by the package bert-score."""
from pathlib import Path

from tqdm import tqdm

from captioning.errors import InputError

CHUNK = 512         # captions per call: bert-score keeps the features of all their words in memory


def bert(captions, references, model, layer=None, device="cpu"):
    """BERTScore as a caption metric, ({"bert": mean}, {"bert": [score of each caption]}): F_BERT of
    each caption with its best reference, without idf weights or rescaling.

    model: name of a model on the Hugging Face hub, or a local folder. layer: the layer whose
    features are compared, by default the one that bert-score recommends for the model, otherwise
    the last. The score is 0 if the caption or all its references are empty."""
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise InputError(
            f"BERTScore is not installed ({error}): pip install bert-score") from error
    scorer = load(BERTScorer, str(model), layer, device)
    scores = [0.0] * len(captions)
    references = [[text for text in texts if text.strip()] for texts in references]
    scored = [i for i, caption in enumerate(captions) if caption.strip() and references[i]]
    chunks = range(0, len(scored), CHUNK)
    for start in tqdm(chunks, desc="BERTScore", unit=f"{CHUNK} captions"):
        indices = scored[start:start + CHUNK]
        _, _, f_scores = scorer.score([captions[i] for i in indices],
                                      [references[i] for i in indices])
        for i, score in zip(indices, f_scores.tolist(), strict=True):
            scores[i] = score
    return {"bert": sum(scores) / len(scores)}, {"bert": scores}


def load(scorer_class, model, layer, device):
    """The scorer of bert-score, with the tokeniser settings of its published scores."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig, AutoTokenizer
    try:
        config = AutoConfig.from_pretrained(model)
        recommended = model2layers.get(model) or model2layers.get(Path(model).name)
        layer = layer or recommended or config.num_hidden_layers
        scorer = scorer_class(model_type=model, num_layers=layer, device=str(device))
        # bert-score requests a prefix space for RoBERTa, which transformers 5 ignores
        tokenizer = AutoTokenizer.from_pretrained(model, add_prefix_space=True)
    except Exception as error:      # of any kind: transformers parses arbitrary files
        raise InputError(
            f"the model {model} of --bert_model cannot be loaded ({str(error).splitlines()[0]}): "
            "give the name of a model on the Hugging Face hub, which requires network access, or a "
            "local folder") from error
    # the tokeniser of a local folder may lack its maximum length; RoBERTa's positions start at 2
    longest = config.max_position_embeddings - 2
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    scorer._tokenizer = tokenizer
    return scorer
