"""Self-critical training: sampled captions, baselines and the loss, against its equation."""
import pytest
import torch
from helpers import V, make, random_regions

from aoamodel import AOAModel
from captioning import decoding
from captioning.data.vocabulary import Vocabulary
from captioning.errors import InputError
from captioning.explanation.lrp_inference import stop_mask
from captioning.training.parts import WHOLE
from captioning.training.reward import CiderD, write_frequencies
from captioning.training.scst import SCST
from gridTDmodel import GridTDModel

MODELS = [GridTDModel, AOAModel]
WORDS = ["<pad>", *"abcdefgh", "<unk>", "<start>", "<end>"]
VOCABULARY = Vocabulary({word: i for i, word in enumerate(WORDS)})
SPECIAL = {0, V - 3, V - 2, V - 1}
REFERENCES = torch.tensor([[[10, 1, 2, 11, 0], [10, 3, 3, 3, 11]]] * 3)


def reward_words(captions, references):
    """A reward that differs between captions: a tenth of the sum of their ids."""
    assert references.shape == (3, 2, 4) and references[0, 0].tolist() == [1, 2, 11, 0]
    return captions.sum(-1).double() / 10


def scst(model, **options):
    return SCST(VOCABULARY, reward_words, 6, **options)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("stop", [None, SPECIAL])
def test_gradient_is_of_the_distribution_that_is_sampled(model_type, stop):
    """The trained log-probabilities, of p or of p̃, equal the scores of sampling."""
    model = make(model_type)
    loss = scst(model, samples=5, stop=None if stop is None else stop_mask(model, stop))
    torch.manual_seed(3)
    context = model.start(random_regions())
    sampled = loss.sample_captions(model, context)
    assert sampled.tokens.shape[:2] == (3, 6)
    log_p = loss.log_probabilities(model, random_regions(), sampled.tokens[:, 1:], context)
    torch.testing.assert_close(log_p.sum(-1).double(), sampled.scores[:, 1:].double(), rtol=1e-5, atol=1e-5)
    assert (log_p[sampled.tokens[:, 1:] == 0] == 0).all()
    greedy = decoding.decode(model, random_regions(), VOCABULARY, "greedy", 6)
    length = min(greedy.shape[1], sampled.tokens.shape[2])
    assert torch.equal(sampled.tokens[:, 0, :length], greedy[:, :length])     # the baseline is of p in both cases


@pytest.mark.parametrize("model_type", MODELS)
def test_p_and_weighted_p_are_two_distributions(model_type):
    model = make(model_type)
    context, results = model.start(random_regions()), []
    torch.manual_seed(0)
    tokens = scst(model).sample_captions(model, context).tokens[:, 1:]
    for stop in (None, SPECIAL, set(range(V))):
        loss = scst(model, stop=None if stop is None else stop_mask(model, stop))
        results.append(loss.log_probabilities(model, random_regions(), tokens, context))
    assert not torch.allclose(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])      # all weights 1


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("baseline, samples", [("greedy", 1), ("greedy", 3), ("mean", 2), ("mean", 4)])
def test_loss_equals_its_equation(model_type, baseline, samples):
    model = make(model_type)
    loss_function = scst(model, samples=samples, baseline=baseline)
    torch.manual_seed(1)
    loss, total, count = loss_function(model, random_regions(), REFERENCES, 0)
    torch.manual_seed(1)
    tokens = loss_function.sample_captions(model, model.start(random_regions())).tokens
    rewards = reward_words(tokens, REFERENCES[..., 1:])
    expected = 0
    for b in range(3):
        indices = range(1, samples + 1) if baseline == "greedy" else range(samples)
        for s in indices:
            others = [0] if baseline == "greedy" else [o for o in indices if o != s]
            advantage = rewards[b, s] - sum(rewards[b, o] for o in others) / len(others)
            ids = [VOCABULARY.start, *(i for i in tokens[b, s].tolist() if i)]
            logits = model(random_regions()[b:b + 1], torch.tensor([ids]))[0]
            logits[:, [0, V - 3, V - 2]] = -torch.inf
            log_p = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            expected = expected - advantage * log_p.sum() / (3.5 * 3 * samples)     # 3.5 tokens per reference
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert count == 3 * samples
    torch.testing.assert_close(total.double(), rewards[:, 1:].sum() if baseline == "greedy" else rewards.sum(),
                               rtol=1e-6, atol=1e-6)
    parameters = [p for name, p in model.named_parameters() if name.startswith("W_")]
    for actual, wanted in zip(torch.autograd.grad(loss, parameters, allow_unused=True),
                              torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        if actual is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type, baseline, stop", [(GridTDModel, "greedy", None), (AOAModel, "mean", None),
                                                        (GridTDModel, "mean", SPECIAL)])
def test_training_raises_the_reward(tmp_path, model_type, baseline, stop):
    """With CIDEr-D as the only signal, the model learns the captions of three images."""
    references = torch.tensor([[[10, 1, 2, 11, 0], [10, 1, 2, 2, 11]], [[10, 3, 4, 11, 0], [10, 3, 4, 5, 11]],
                               [[10, 6, 7, 8, 11], [10, 6, 7, 8, 11]]])
    write_frequencies(tmp_path / "x.hdf5", references.numpy(), V)
    torch.manual_seed(0)
    options = {"num_head": 2} if model_type is AOAModel else {"attention_dim": 5}
    model = model_type(V, 8, 16, encoder=None, feature_dim=7, dropout=0.0, **options)
    features = random_regions().float()
    loss_function = SCST(VOCABULARY, CiderD(tmp_path / "x.hdf5", V), 5, 16, baseline,
                         None if stop is None else stop_mask(model, stop))
    optimizer, rewards = torch.optim.Adam(model.parameters(), lr=2e-2), []
    for _ in range(100):
        loss, total, count = loss_function(model, features, references, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append((total / count).item())
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


@pytest.mark.parametrize("passes", [1, 2])
def test_constant_reward_raises_an_error(passes):
    """After PATIENCE steps, whatever the number of their passes."""
    model, part = make(GridTDModel), WHOLE._replace(passes=passes)
    loss = SCST(VOCABULARY, lambda captions, references: torch.ones(captions.shape[:2]), 6)
    loss.PATIENCE = 5
    for _ in range(5 * passes - 1):
        assert loss(model, random_regions(), REFERENCES, 2, part)[0] == 0
    with pytest.raises(InputError, match="constant for 5 steps in epoch 3.*--decoder_lr"):
        loss(model, random_regions(), REFERENCES, 2, part)
