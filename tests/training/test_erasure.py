"""Evidence erasure: words and evidence against literal loops, the loss against its equation."""
import pytest
import torch
from helpers import (
    MODELS,
    make,
    make_batch,
    max_pooled,
    random_images,
    random_regions,
    vocabulary_of,
)

from aoamodel import AOAModel
from captioning.data.vocabulary import build
from captioning.metrics.object_words import NO_OBJECT, Objects
from captioning.training import erasure
from captioning.training.losses import CrossEntropy

VOCABULARY = build(["stuvwxyz"], 1)
CATEGORIES = torch.tensor([-1, -1, -1, 0, 0, 1, 2, -1, -1, -1, -1, -1])
CAPTIONS = torch.tensor([[[1, 3, 7, 5, 6, 2], [1, 5, 8, 4, 2, 0]],
                         [[1, 3, 7, 4, 2, 0], [1, 3, 7, 4, 2, 0]],
                         [[1, 7, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0]]])


def erasure_loss(weight, keep_weight, share, categories=CATEGORIES, **options):
    return erasure.ErasureLoss(VOCABULARY, categories=categories, weight=weight,
                               keep_weight=keep_weight, share=share, **options)


def choice_of(caption, steps, categories, seed=0):
    batch = make_batch(categories, seed)
    return erasure.Choice(caption, steps, categories, batch["seeds"], batch["index"])


def value(loss, model, features, **options):
    batch = make_batch(CAPTIONS, **options)
    return loss(model, features, batch, loss.counts(batch))[0]


def literal_evidence(relevance, categories, count):
    """The indices of the erased regions of one image, as literal loops."""
    words = [[max(0.0, value) for value in row] for row in relevance.tolist()]
    words = [[value / max(row) if max(row) > 0 else 0.0 for value in row] for row in words]
    candidates = []
    for k, value in enumerate(words[0]):
        others = zip(words[1:], categories[1:], strict=True)
        exceeds = all(value > row[k] for row, category in others
                      if category not in (-1, categories[0]))
        if categories[0] >= 0 and value > 0 and exceeds:
            candidates.append((-value, k))
    return {k for _, k in sorted(candidates)[:count]}


@pytest.mark.parametrize("count", [1, 3, 20])
def test_own_evidence_equals_literal_loops(count):
    generator = torch.Generator().manual_seed(count)
    relevance = torch.randn(40, 4, 9, generator=generator)
    categories = torch.randint(-1, 3, (40, 4), generator=generator)
    relevance[0] = -1       # nothing is positive
    chosen = erasure.own_evidence(relevance, categories, count)
    for row, image, ids in zip(chosen, relevance, categories.tolist(), strict=True):
        if ids[0] >= 0:
            assert set(row.nonzero().flatten().tolist()) == literal_evidence(image, ids, count)


def test_words_are_chosen_at_random_among_the_object_words():
    seen = [set(), set(), set()]
    for seed in range(200):
        choice = erasure.choose(make_batch(CAPTIONS, seed), CATEGORIES)
        for b, caption in enumerate(choice.caption):
            words = [int(w) for w in caption[1:] if CATEGORIES[w] >= 0]
            steps = choice.steps[b, :len(words)]
            assert sorted(caption[steps + 1].tolist()) == sorted(words)
            padding = [-1] * (choice.steps.shape[1] - len(words))
            ids = CATEGORIES[caption[steps + 1]].tolist()
            assert choice.categories[b].tolist() == ids + padding
            seen[b].add((caption[1].item(), int(choice.categories[b, 0])))
    assert seen == [{(3, 0), (3, 1), (3, 2), (5, 0), (5, 1)}, {(3, 0)}, {(7, -1), (9, -1)}]


def test_the_choice_does_not_depend_on_the_other_images_of_a_pass():
    batch = make_batch(CAPTIONS)
    together = erasure.choose(batch, CATEGORIES)
    for b in range(3):      # shorter captions, and fewer object words
        length = int((CAPTIONS[b] != 0).sum(-1).max())
        alone = erasure.choose({"captions": CAPTIONS[b:b + 1, :, :length],
                                **{key: batch[key][b:b + 1] for key in ("seeds", "index")}},
                               CATEGORIES)
        S = alone.steps.shape[1]
        assert torch.equal(alone.caption[0], together.caption[b, :length])
        assert torch.equal(alone.categories[0], together.categories[b, :S])


@MODELS
def test_loss_and_gradient_equal_the_equation(model_type, monkeypatch):
    """With the erased features given: −log(1 − p) of all words of the erased category, and κ times
    the cross-entropy of the rest of the first caption. The second caption names one category, the
    third another object of the erased one, and has no region of its own: its word is unlearned from
    the image as it is."""
    model, features = make(model_type), random_regions().requires_grad_()
    captions = torch.tensor([[1, 3, 7, 5, 8, 2], [1, 3, 7, 8, 2, 0], [1, 3, 5, 4, 2, 0]])
    choice = choice_of(captions, torch.tensor([[2, 0, 1], [0, 2, 1], [0, 1, 2]]),
                       torch.tensor([[1, 0, -1], [0, -1, -1], [0, 1, 0]]))
    categories = CATEGORIES.clone()
    categories[9] = 1                                                # a synonym of word 5
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    monkeypatch.setattr(erasure, "choose", lambda *_: choice)
    monkeypatch.setattr(erasure, "own_evidence", lambda *_: mask[[0, 2]])
    loss_function = erasure_loss(0.7, 0.3, 0.5, categories=categories, fill="zero")
    loss_function.is_determiner[8] = True
    loss = value(loss_function, model, features)
    features_without = features * ~mask[..., None]
    p = model(features_without, captions).softmax(-1)
    rest = model(features_without[:1], torch.tensor([[1, 3, 8, 2]])).log_softmax(-1)
    not_named = [p[0, 2, 5] + p[0, 2, 9], p[2, 0, 3] + p[2, 0, 4], p[2, 2, 3] + p[2, 2, 4]]
    ce = value(CrossEntropy(VOCABULARY), model, features)
    expected = ce - 0.7 * sum((1 - x).log() for x in not_named) / 3
    expected = expected - 0.3 * sum(rest[0, t, w] for t, w in enumerate([3, 8, 2])) / 3
    torch.testing.assert_close(loss, expected.float())
    variables = [features, *(x for x in model.parameters() if x.requires_grad)]
    torch.testing.assert_close(*(torch.autograd.grad(x, variables) for x in (loss, expected)),
                               rtol=1e-4, atol=1e-7)


def test_prediction_from_the_erased_image_has_dropout(monkeypatch):
    """If all units are dropped, the probabilities are those of the biases alone."""
    model, features = make(AOAModel).train(), random_regions()
    model.dropout.p = 1.0
    monkeypatch.setattr(erasure, "own_evidence",
                        lambda relevance, *_: relevance[:, 0] == relevance[:, 0, :1])
    loss = value(erasure_loss(1.0, 0.0, 0.5), model, features)
    choice = erasure.choose(make_batch(CAPTIONS), CATEGORIES)
    used = choice.categories[erasure.is_other(choice.categories).any(1), 0]
    p = model.W_o.bias.softmax(-1)
    expected = [-(1 - p[category == CATEGORIES].sum()).log() for category in used]
    ce = value(CrossEntropy(VOCABULARY), model, features)
    torch.testing.assert_close(loss, (ce + torch.stack(expected).mean()).float())


@pytest.mark.parametrize("evidence", ["lrp", "gradient", "grad_cam"])
def test_relevance_is_not_rounded_by_autocast(evidence):
    model, features = make(AOAModel).float(), random_regions().float()
    loss = erasure_loss(1.0, 0.0, 0.5, evidence=evidence)
    choice = erasure.choose(make_batch(CAPTIONS), CATEGORIES)
    expected = loss.relevance(model, features, choice)
    with torch.autocast("cpu", torch.bfloat16):
        relevance = loss.relevance(model, features, choice)
    assert torch.equal(relevance, expected)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.29, 0.53, 0.59, 1.0])
def test_erased_share_of_the_regions(share):
    """Of those that are no padding; one region at least remains, and no region becomes padding."""
    features, sizes = torch.randn(4, 100, 3), (100, 50, 4, 1)
    for row, size in zip(features, sizes, strict=True):
        row[size:] = 0
    zeros = torch.zeros(4, 1, dtype=torch.long)
    loss = erasure_loss(1.0, 1.0, share, evidence="random")
    erased = loss.erase(None, features, choice_of(None, zeros, zeros))
    expected = [min(max(1, round(share * 100) * size // 100), size - 1) for size in sizes]
    assert (erased != features).any(-1).sum(1).tolist() == expected
    assert erased.any(-1).sum(1).tolist() == list(sizes)


@pytest.mark.parametrize("caption, word, expected", [
    ("a cat with a chair by a lake", "chair", "a cat by a lake"),
    ("there is a small cat to the left of a chair in the snow", "cat",
     "there is a chair in the snow"),
    ("there is a small cat to the left of a chair in the snow", "chair",
     "there is a small cat in the snow"),
    ("two birds near a dog and a chair", "dog", "two birds and a chair"),
    ("a dog with a chair", "chair", "a dog"), ("cat near brown birds", "cat", "birds"),
    ("young cat beside another dog", "cat", "another dog")])
def test_caption_without_a_noun_phrase(caption, word, expected):
    words = caption.split()
    vocabulary = build([words], 1)
    ids = torch.tensor([[*vocabulary.encode(words, 20), 0, 0]])
    named = torch.tensor([w in ("cat", "chair", "dog", "birds") for w in vocabulary.words])
    is_determiner = torch.tensor([w in erasure.DETERMINERS for w in vocabulary.words])
    position = torch.tensor([[words.index(word) + 1]])
    short = erasure.without_noun_phrase(ids, position, named[ids], is_determiner[ids])
    assert vocabulary.decode(short[0].tolist()) == expected.split()
    assert short.shape == ids.shape and vocabulary.end in short


def test_erasure_in_every_second_step_has_twice_the_weight(monkeypatch):
    model, features = make(AOAModel), random_regions()
    monkeypatch.setattr(erasure.ErasureLoss, "erased_loss", lambda *_: torch.tensor(0.3))
    loss = erasure_loss(0.7, 0.0, 0.3, every=2)
    ce = value(CrossEntropy(VOCABULARY), model, features)
    more = [(value(loss, model, features, step=step) - ce).item() for step in range(3)]
    assert more == pytest.approx([0.6, 0, 0.6], abs=1e-6)


@pytest.mark.parametrize("sizes", [(9, 9, 9), (9, 4, 2)])
def test_erased_regions_are_filled_with_the_least_relevant_half_of_the_others(sizes):
    """Images with padding, too; the mean is that of the regions that remain."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 9, 4, generator=generator)
    relevance = torch.randn(3, 2, 9, generator=generator)
    choice = choice_of(None, None, torch.tensor([[1, 2], [0, -1], [2, 0]]))
    remains = torch.arange(9) < torch.tensor(sizes)[:, None]
    remains[:, 1] = False                                            # erased
    filled = {fill: erasure_loss(1.0, 1.0, 0.5, fill=fill).filling(
        features, relevance, choice, remains) for fill in erasure.FILL}
    assert not filled["zero"].any()
    for b, rows in enumerate(remains):
        is_object = choice.categories[b] >= 0
        of_words = erasure.fractions(relevance[b])[is_object].amax(0).tolist()
        kept = sorted(rows.nonzero().flatten().tolist(), key=of_words.__getitem__)
        allowed = [features[b, k].tolist() for k in kept[:(len(kept) + 1) // 2]]
        chosen = filled["background"][b].tolist()
        assert all(row in allowed for row in chosen)
        assert len(allowed) == 1 or len(set(map(tuple, chosen))) > 1
        torch.testing.assert_close(filled["mean"][b, 0], features[b, rows].mean(0))


@MODELS
def test_without_weight_loss_and_gradient_are_those_of_the_cross_entropy(model_type):
    model = make(model_type, max_pooled).train()
    results = []
    for loss_function in (erasure_loss(0.0, 0.0, 0.3), CrossEntropy(VOCABULARY)):
        torch.manual_seed(0)
        model.zero_grad()
        loss = value(loss_function, model, model.encode(random_images()))
        loss.backward()
        results.append([loss.detach(), *(x.grad.clone() for x in model.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@MODELS
def test_no_gradient_flows_through_the_choice_of_evidence(model_type, monkeypatch):
    """The gradient equals that for the same regions, given as a constant."""
    model, own_evidence = make(model_type, max_pooled), erasure.own_evidence
    gradients, masks = [], []

    def recorded(*arguments):
        masks.append(own_evidence(*arguments))
        assert not arguments[0].requires_grad and masks[-1].any()
        return masks[-1]

    for choice_of_evidence in (recorded, lambda *_: masks[0]):
        monkeypatch.setattr(erasure, "own_evidence", choice_of_evidence)
        model.zero_grad()
        value(erasure_loss(1.0, 1.0, 0.3), model, model.encode(random_images())).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients[0])


@pytest.mark.parametrize("evidence", erasure.EVIDENCE)
def test_evidence_of_controls(evidence, monkeypatch):
    """own_evidence gets the relevance of the chosen words' regions, of images with objects of two
    categories; without --erase_own_evidence of the first word alone."""
    model, features, got = make(AOAModel), random_regions(), []
    choice = choice_of(CAPTIONS[:, 0], torch.tensor([[3, 0], [0, 2], [0, 1]]),
                       torch.tensor([[1, 2], [0, -1], [2, 0]]))
    monkeypatch.setattr(erasure, "choose", lambda *_: choice)
    monkeypatch.setattr(erasure, "own_evidence", lambda *arguments: (
        got.append(arguments) or arguments[0][:, 0] > 1e9))
    for own in (True, False):
        value(erasure_loss(1.0, 1.0, 0.3, evidence=evidence, own_evidence=own), model, features)
    for (relevance, categories, _), S in zip(got, (2, 1), strict=True):
        assert relevance.shape == (2, 2, features.shape[1])
        assert torch.equal(categories, choice.categories[[0, 2], :S])
    relevance = got[0][0]
    if evidence == "random":
        assert relevance.unique().numel() > 20
        return
    explanation = getattr(model, evidence)(features, CAPTIONS[:, 0])
    if evidence == "attention":
        expected = explanation.attention.mean(2)
    else:
        channels = explanation.features
        weights = channels.mean(2, keepdim=True) * features[:, None]
        expected = (weights if evidence == "grad_cam" else channels).sum(-1)
    expected = expected.take_along_dim(choice.steps[..., None], dim=1)[[0, 2]]
    torch.testing.assert_close(relevance, expected)


def test_captions_without_object_words_leave_the_cross_entropy():
    model, features = make(AOAModel), random_regions()
    loss = erasure_loss(1.0, 1.0, 0.5, categories=torch.full_like(CATEGORIES, -1))
    expected = value(CrossEntropy(VOCABULARY), model, features)
    torch.testing.assert_close(value(loss, model, features), expected)


def test_synonyms_share_a_category():
    vocabulary = vocabulary_of(["dog", "puppy", "ball", "track"])
    objects = Objects({"dog": "dog", "puppy": "dog", "ball": "ball", "teddy bear": "bear",
                       "track": NO_OBJECT})
    ids = objects.category_ids(vocabulary).tolist()
    assert ids[1] == ids[2] != ids[3] and min(ids[1:4]) >= 0 and set(ids[4:] + ids[:1]) == {-1}
