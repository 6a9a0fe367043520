"""Self-critical training: sampled captions, baselines and the loss, against its equation."""
import pytest
import torch
from helpers import MODELS, V, make, make_batch, random_regions, refused, vocabulary_of

from aoamodel import AOAModel
from captioning import decoding
from captioning.explanation.lrp_inference import stop_mask
from captioning.training.reward import CiderD, write_frequencies
from captioning.training.scst import SCST
from gridTDmodel import GridTDModel

VOCABULARY = vocabulary_of("abcdefgh")
SPECIAL = {0, V - 3, V - 2, V - 1}
REFERENCES = torch.tensor([[[10, 1, 2, 11, 0], [10, 3, 3, 3, 11]]] * 3)
SEEDS = make_batch(REFERENCES)["seeds"]


def reward_words(captions, references):
    """A reward that differs between captions: a tenth of the sum of their ids."""
    assert references.shape == (3, 2, 4) and references[0, 0].tolist() == [1, 2, 11, 0]
    return captions.sum(-1).double() / 10


def scst(model, stop=None, reward=reward_words, **options):
    mask = None if stop is None else stop_mask(model, stop)
    return SCST(VOCABULARY, reward, 6, stop=mask, **options)


def step(loss, model, features=None, references=REFERENCES, **options):
    batch = make_batch(references, **options)
    features = random_regions() if features is None else features
    return loss(model, features, batch, loss.counts(batch))


@MODELS
@pytest.mark.parametrize("stop", [None, SPECIAL])
def test_gradient_is_of_the_distribution_that_is_sampled(model_type, stop):
    """The trained log-probabilities, of p or of p̃, equal the scores of sampling."""
    model = make(model_type)
    loss = scst(model, stop, samples=5)
    context = model.start(random_regions())
    sampled = loss.sample_captions(model, context, SEEDS)
    tokens = sampled.tokens[:, 1:]
    assert tokens.shape[:2] == (3, 5)
    log_p = loss.log_probabilities(model, random_regions(), tokens, context)
    torch.testing.assert_close(log_p.sum(-1).double(), sampled.scores[:, 1:].double(), rtol=1e-5,
                               atol=1e-5)
    assert (log_p[tokens == 0] == 0).all()
    # the baseline is of p in both cases
    greedy = decoding.decode(model, random_regions(), VOCABULARY, "greedy", 6)
    length = min(greedy.shape[1], tokens.shape[2])
    assert torch.equal(sampled.tokens[:, 0, :length], greedy[:, :length])


@MODELS
def test_p_and_weighted_p_are_two_distributions(model_type):
    model = make(model_type)
    context = model.start(random_regions())
    tokens = scst(model).sample_captions(model, context, SEEDS).tokens[:, 1:]
    p, weighted, all_stopped = (
        scst(model, stop).log_probabilities(model, random_regions(), tokens, context)
        for stop in (None, SPECIAL, set(range(V))))
    assert not torch.allclose(p, weighted)
    torch.testing.assert_close(p, all_stopped)      # all weights 1


@MODELS
@pytest.mark.parametrize("baseline, samples", [("greedy", 1), ("greedy", 3), ("mean", 2),
                                               ("mean", 4)])
def test_loss_equals_its_equation(model_type, baseline, samples):
    model = make(model_type)
    loss_function = scst(model, samples=samples, baseline=baseline)
    loss, (total, count) = step(loss_function, model)
    context = model.start(random_regions())
    tokens = loss_function.sample_captions(model, context, SEEDS).tokens
    rewards = reward_words(tokens, REFERENCES[..., 1:])
    indices = range(1, samples + 1) if baseline == "greedy" else range(samples)
    expected = 0
    for b in range(3):
        for s in indices:
            others = [0] if baseline == "greedy" else [o for o in indices if o != s]
            advantage = rewards[b, s] - sum(rewards[b, o] for o in others) / len(others)
            ids = [VOCABULARY.start, *(i for i in tokens[b, s].tolist() if i)]
            logits = model(random_regions()[b:b + 1], torch.tensor([ids]))[0]
            logits[:, [0, V - 3, V - 2]] = -torch.inf
            log_p = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            # 3.5 tokens per reference
            expected = expected - advantage * log_p.sum() / (3.5 * 3 * samples)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert count == 3 * samples
    torch.testing.assert_close(total.double(), rewards[:, indices].sum(), rtol=1e-6, atol=1e-6)
    parameters = [p for name, p in model.named_parameters() if name.startswith("W_")]
    actual, wanted = (torch.autograd.grad(x, parameters, allow_unused=True, materialize_grads=True)
                      for x in (loss, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type, baseline, stop", [
    (GridTDModel, "greedy", None), (AOAModel, "mean", None), (GridTDModel, "mean", SPECIAL)])
def test_training_raises_the_reward(tmp_path, model_type, baseline, stop):
    """With CIDEr-D as the only signal, the model learns the captions of three images."""
    references = torch.tensor([[[10, 1, 2, 11, 0], [10, 1, 2, 2, 11]],
                               [[10, 3, 4, 11, 0], [10, 3, 4, 5, 11]],
                               [[10, 6, 7, 8, 11], [10, 6, 7, 8, 11]]])
    write_frequencies(tmp_path / "x.hdf5", references.numpy(), V)
    torch.manual_seed(0)
    options = {"num_head": 2} if model_type is AOAModel else {"attention_dim": 5}
    model = model_type(V, 8, 16, encoder=None, feature_dim=7, dropout=0.0, **options)
    loss_function = scst(model, stop, CiderD(tmp_path / "x.hdf5", V), samples=16, baseline=baseline)
    loss_function.max_len = 5
    optimizer, rewards = torch.optim.Adam(model.parameters(), lr=2e-2), []
    for seed in range(100):
        loss, (total, count) = step(loss_function, model, random_regions().float(), references,
                                    seed=seed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rewards.append((total / count).item())
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5])


def test_constant_reward_raises_an_error():
    """After PATIENCE steps, whatever the number of their passes."""
    model = make(GridTDModel)
    loss = scst(model, reward=lambda captions, references: torch.ones(captions.shape[:2]))
    loss.PATIENCE = 5
    for number in range(10):
        assert step(loss, model, epoch=2, step=7 + number // 2)[0] == 0
    with refused("constant for 5 steps in epoch 3.*--decoder_lr"):
        step(loss, model, epoch=2, step=12)
