"""Evidence erasure: the choice of words and evidence against literal loops, and the loss against its equation."""
import pytest
import torch
from helpers import make, max_pooled, random_images, random_regions

from aoamodel import AOAModel
from captioning.data.vocabulary import Vocabulary, build
from captioning.metrics.object_words import NO_OBJECT, Objects
from captioning.training import erasure
from captioning.training.losses import cross_entropy
from gridTDmodel import GridTDModel

MODELS = [GridTDModel, AOAModel]
VOCABULARY = build(["stuvwxyz"], 1)
CATEGORIES = torch.tensor([-1, -1, -1, 0, 0, 1, 2, -1, -1, -1, -1, -1])
CAPTIONS = torch.tensor([[[1, 3, 7, 5, 6, 2], [1, 5, 8, 4, 2, 0]], [[1, 3, 7, 4, 2, 0], [1, 3, 7, 4, 2, 0]],
                         [[1, 7, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0]]])


def literal_evidence(relevance, categories, count):
    """The indices of the erased regions of one image, as literal loops."""
    words = [[max(0.0, value) for value in row] for row in relevance.tolist()]
    words = [[value / max(row) if max(row) > 0 else 0.0 for value in row] for row in words]
    candidates = []
    for k, value in enumerate(words[0]):
        exceeds = all(value > row[k] for row, category in zip(words[1:], categories[1:], strict=True)
                      if category not in (-1, categories[0]))
        if categories[0] >= 0 and value > 0 and exceeds:
            candidates.append((-value, k))
    return {k for _, k in sorted(candidates)[:count]}


@pytest.mark.parametrize("count", [1, 3, 20])
def test_own_evidence_equals_literal_loops(count):
    generator = torch.Generator().manual_seed(count)
    relevance = torch.randn(40, 4, 9, generator=generator)
    categories = torch.randint(-1, 3, (40, 4), generator=generator)
    relevance[0] = -1                                                                  # nothing is positive
    chosen = erasure.own_evidence(relevance, categories, count)
    for row, image, ids in zip(chosen, relevance, categories.tolist(), strict=True):
        if ids[0] >= 0:
            assert set(row.nonzero().flatten().tolist()) == literal_evidence(image, ids, count)


def test_words_are_chosen_at_random_among_the_object_words():
    torch.manual_seed(0)
    seen = [set(), set(), set()]
    for _ in range(200):
        choice = erasure.choose(CAPTIONS, CATEGORIES)
        for b, caption in enumerate(choice.caption):
            words = [int(w) for w in caption[1:] if CATEGORIES[w] >= 0]
            steps = choice.steps[b, :len(words)]
            assert sorted(caption[steps + 1].tolist()) == sorted(words)
            assert choice.categories[b].tolist() == (
                CATEGORIES[caption[steps + 1]].tolist() + [-1] * (choice.steps.shape[1] - len(words)))
            seen[b].add((caption[1].item(), int(choice.categories[b, 0])))
    assert seen == [{(3, 0), (3, 1), (3, 2), (5, 0), (5, 1)}, {(3, 0)}, {(7, -1), (9, -1)}]


@pytest.mark.parametrize("model_type", MODELS)
def test_loss_and_gradient_equal_the_equation(model_type, monkeypatch):
    """With the erased features given: −log(1 − p) of all words of the erased category, and κ times the cross-entropy of
    the rest of the first caption. The second caption names one category, the third another object of the erased one,
    and has no region of its own: its word is unlearned from the image as it is."""
    model, features = make(model_type), random_regions().requires_grad_()
    captions = torch.tensor([[1, 3, 7, 5, 8, 2], [1, 3, 7, 8, 2, 0], [1, 3, 5, 4, 2, 0]])
    choice = erasure.Choice(captions, torch.tensor([[2, 0, 1], [0, 2, 1], [0, 1, 2]]),
                            torch.tensor([[1, 0, -1], [0, -1, -1], [0, 1, 0]]))
    categories = CATEGORIES.clone()
    categories[9] = 1                                                                  # a synonym of word 5
    mask = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    monkeypatch.setattr(erasure, "choose", lambda *_: choice)
    monkeypatch.setattr(erasure, "own_evidence", lambda *_: mask[[0, 2]])
    loss_function = erasure.ErasureLoss(VOCABULARY, categories, 0.7, 0.3, 0.5, fill="zero")
    loss_function.is_determiner[8] = True
    loss, correct, words = loss_function(model, features, CAPTIONS, 0)
    features_without = features * ~mask[..., None]
    p = model(features_without, captions).softmax(-1)
    rest = model(features_without[:1], torch.tensor([[1, 3, 8, 2]])).log_softmax(-1)
    not_named = [p[0, 2, 5] + p[0, 2, 9], p[2, 0, 3] + p[2, 0, 4], p[2, 2, 3] + p[2, 2, 4]]
    ce, *counts = cross_entropy(model, model.teacher_force(features, CAPTIONS), CAPTIONS)
    expected = ce - 0.7 * sum((1 - x).log() for x in not_named) / 3 - 0.3 * sum(
        rest[0, t, w] for t, w in enumerate([3, 8, 2])) / 3
    assert [correct, words] == counts
    torch.testing.assert_close(loss, expected.float())
    variables = [features, *(x for x in model.parameters() if x.requires_grad)]
    torch.testing.assert_close(*(torch.autograd.grad(x, variables) for x in (loss, expected)), rtol=1e-4,
                               atol=1e-7)


def test_prediction_from_the_erased_image_has_dropout(monkeypatch):
    """If all units are dropped, the probabilities are those of the biases alone."""
    model, features = make(AOAModel).train(), random_regions()
    model.dropout.p = 1.0
    monkeypatch.setattr(erasure, "own_evidence", lambda relevance, *_: relevance[:, 0] == relevance[:, 0, :1])
    torch.manual_seed(0)
    choice = erasure.choose(CAPTIONS, CATEGORIES)
    torch.manual_seed(0)
    loss = erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 0.0, 0.5)(model, features, CAPTIONS, 0)[0]
    used = choice.categories[erasure.is_other(choice.categories).any(1), 0]
    p = model.W_o.bias.softmax(-1)
    expected = torch.stack([-(1 - p[category == CATEGORIES].sum()).log() for category in used]).mean()
    ce = cross_entropy(model, model.teacher_force(features, CAPTIONS), CAPTIONS)[0]
    torch.testing.assert_close(loss, (ce + expected).float())


@pytest.mark.parametrize("evidence", ["lrp", "gradient", "grad_cam"])
def test_relevance_is_not_rounded_by_autocast(evidence):
    model, features = make(AOAModel).float(), random_regions().float()
    loss = erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 0.0, 0.5, evidence)
    choice = erasure.choose(CAPTIONS, CATEGORIES)
    expected = loss.relevance(model, features, choice, erasure.WHOLE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss.relevance(model, features, choice, erasure.WHOLE), expected, rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.29, 0.53, 0.59, 1.0])
def test_erased_share_of_the_regions(share):
    """Of those that are no padding; one region at least remains, and no region becomes padding."""
    features, sizes = torch.randn(4, 100, 3), (100, 50, 4, 1)
    for row, size in zip(features, sizes, strict=True):
        row[size:] = 0
    choice = erasure.Choice(None, torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long))
    erased = erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 1.0, share, "random").erase(
        None, features, choice, erasure.WHOLE)
    expected = [min(max(1, round(share * 100) * size // 100), size - 1) for size in sizes]
    assert (erased != features).any(-1).sum(1).tolist() == expected
    assert erased.any(-1).sum(1).tolist() == list(sizes)


@pytest.mark.parametrize("caption, word, expected", [
    ("a cat with a chair by a lake", "chair", "a cat by a lake"),
    ("there is a small cat to the left of a chair in the snow", "cat", "there is a chair in the snow"),
    ("there is a small cat to the left of a chair in the snow", "chair", "there is a small cat in the snow"),
    ("two birds near a dog and a chair", "dog", "two birds and a chair"), ("a dog with a chair", "chair", "a dog"),
    ("young cat beside another dog", "cat", "another dog"), ("cat near brown birds", "cat", "birds")])
def test_caption_without_a_noun_phrase(caption, word, expected):
    words = caption.split()
    vocabulary = build([words], 1)
    ids = torch.tensor([[*vocabulary.encode(words, 20), 0, 0]])
    named = torch.tensor([w in ("cat", "chair", "dog", "birds") for w in vocabulary.words])
    is_determiner = erasure.ErasureLoss(vocabulary, named.long(), 1.0, 1.0, 0.5).is_determiner
    short = erasure.without_noun_phrase(ids, torch.tensor([[words.index(word) + 1]]), named[ids], is_determiner[ids])
    assert vocabulary.decode(short[0].tolist()) == expected.split()
    assert short.shape == ids.shape and vocabulary.end in short


def test_erasure_in_every_second_step_has_twice_the_weight(monkeypatch):
    model, features = make(AOAModel), random_regions()
    monkeypatch.setattr(erasure.ErasureLoss, "erased_loss", lambda *_: torch.tensor(0.3))
    loss = erasure.ErasureLoss(VOCABULARY, CATEGORIES, 0.7, 0.0, 0.3, every=2)
    ce = cross_entropy(model, model.teacher_force(features, CAPTIONS), CAPTIONS)[0]
    more = [(loss(model, features, CAPTIONS, 0, erasure.WHOLE._replace(step=step))[0] - ce).item() for step in range(3)]
    assert more == pytest.approx([0.6, 0, 0.6], abs=1e-6)


def test_padding_is_never_erased():
    """Neither with random evidence, which is positive everywhere."""
    features, loss = random_regions(), erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 1.0, 1.0, "random")
    features[:, 3:] = 0
    for seed in range(20):
        torch.manual_seed(seed)
        erased = loss.erase(None, features, erasure.choose(CAPTIONS, CATEGORIES), erasure.WHOLE)
        assert not erased[:, 3:].any() and not torch.equal(erased, features)


@pytest.mark.parametrize("sizes", [(9, 9, 9), (9, 4, 2)])
def test_erased_regions_are_filled_with_the_least_relevant_half_of_the_others(sizes):
    """Images with padding, too; the mean is that of the regions that remain."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 9, 4, generator=generator)
    relevance = torch.randn(3, 2, 9, generator=generator)
    choice = erasure.Choice(None, None, torch.tensor([[1, 2], [0, -1], [2, 0]]))
    remains = torch.arange(9) < torch.tensor(sizes)[:, None]
    remains[:, 1] = False                                                              # erased
    filled = {fill: erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 1.0, 0.5, fill=fill).filling(
        features, relevance, choice, remains, erasure.WHOLE) for fill in erasure.FILL}
    assert not filled["zero"].any()
    for b, rows in enumerate(remains):
        of_words = erasure.fractions(relevance[b])[choice.categories[b] >= 0].amax(0).tolist()
        kept = sorted(rows.nonzero().flatten().tolist(), key=of_words.__getitem__)
        allowed = [features[b, k].tolist() for k in kept[:(len(kept) + 1) // 2]]
        chosen = filled["background"][b].tolist()
        assert all(row in allowed for row in chosen) and (len(allowed) == 1 or len(set(map(tuple, chosen))) > 1)
        torch.testing.assert_close(filled["mean"][b, 0], features[b, rows].mean(0))


@pytest.mark.parametrize("model_type", MODELS)
def test_without_weight_loss_and_gradient_are_those_of_the_cross_entropy(model_type):
    model = make(model_type, max_pooled).train()
    results = []
    for loss_function in (erasure.ErasureLoss(VOCABULARY, CATEGORIES, 0.0, 0.0, 0.3),
                          lambda model, features, captions, _: cross_entropy(
                              model, model.teacher_force(features, captions, skip_padding=True), captions)):
        torch.manual_seed(0)
        model.zero_grad()
        loss = loss_function(model, model.encode(random_images()), CAPTIONS, 0)[0]
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_no_gradient_flows_through_the_choice_of_evidence(model_type, monkeypatch):
    """The gradient equals that for the same regions, given as a constant."""
    model, gradients, own_evidence, masks = make(model_type, max_pooled), [], erasure.own_evidence, []

    def recorded(*arguments):
        masks.append(own_evidence(*arguments))
        assert not arguments[0].requires_grad and masks[-1].any()
        return masks[-1]

    for choice_of_evidence in (recorded, lambda *_: masks[0]):
        monkeypatch.setattr(erasure, "own_evidence", choice_of_evidence)
        torch.manual_seed(2)
        model.zero_grad()
        loss = erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 1.0, 0.3)
        loss(model, model.encode(random_images()), CAPTIONS, 0)[0].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients[0])


@pytest.mark.parametrize("evidence", erasure.EVIDENCE)
def test_evidence_of_controls(evidence, monkeypatch):
    """own_evidence gets the relevance of the chosen words' regions, of images with objects of two categories; without
    --own_evidence of the first word alone."""
    model, features, got = make(AOAModel), random_regions(), []
    choice = erasure.Choice(CAPTIONS[:, 0], torch.tensor([[3, 0], [0, 2], [0, 1]]),
                            torch.tensor([[1, 2], [0, -1], [2, 0]]))
    monkeypatch.setattr(erasure, "choose", lambda *_: choice)
    monkeypatch.setattr(erasure, "own_evidence", lambda *arguments: got.append(arguments) or arguments[0][:, 0] > 1e9)
    for own in (True, False):
        erasure.ErasureLoss(VOCABULARY, CATEGORIES, 1.0, 1.0, 0.3, evidence, own)(model, features, CAPTIONS, 0)
    for (relevance, categories, _), S in zip(got, (2, 1), strict=True):
        assert relevance.shape == (2, 2, features.shape[1])
        assert torch.equal(categories, choice.categories[[0, 2], :S])
    if evidence == "random":
        assert not torch.equal(got[0][0], got[1][0])
        return
    explanation = getattr(model, evidence)(features, CAPTIONS[:, 0])
    expected = explanation.attention.mean(2) if evidence == "attention" else explanation.features.sum(-1)
    if evidence == "grad_cam":
        expected = (explanation.features.mean(2, keepdim=True) * features[:, None]).sum(-1)
    expected = expected.take_along_dim(choice.steps[..., None], dim=1)[[0, 2]]
    torch.testing.assert_close(got[0][0], expected)


def test_captions_without_object_words_leave_the_cross_entropy():
    model, features = make(AOAModel), random_regions()
    nothing = torch.full_like(CATEGORIES, -1)
    loss = erasure.ErasureLoss(VOCABULARY, nothing, 1.0, 1.0, 0.5)(model, features, CAPTIONS, 0)[0]
    torch.testing.assert_close(loss, cross_entropy(model, model.teacher_force(features, CAPTIONS), CAPTIONS)[0])


def test_synonyms_share_a_category():
    vocabulary = Vocabulary({word: i for i, word in enumerate(["<pad>", "dog", "puppy", "ball", "track", "<unk>",
                                                               "<start>", "<end>"])})
    objects = Objects({"dog": "dog", "puppy": "dog", "ball": "ball", "teddy bear": "bear", "track": NO_OBJECT})
    ids = objects.category_ids(vocabulary).tolist()
    assert ids[1] == ids[2] != ids[3] and min(ids[1:4]) >= 0 and set(ids[4:] + ids[:1]) == {-1}
