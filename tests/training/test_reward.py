"""CIDEr-D of token ids against a plain implementation and pycocoevalcap."""
import random
from collections import Counter
from math import exp, log, sqrt

import h5py
import numpy as np
import pytest
import torch
from helpers import refused

from captioning.data import dataset
from captioning.data.annotations import Record
from captioning.data.vocabulary import build
from captioning.files import write_json
from captioning.training.reward import CiderD, write_frequencies

V, START, END = 14, 12, 13


def caption(generator, longest=9):
    """Random ids from <start> to <end>, of 8 distinct words, so that n-grams repeat."""
    return [START, *generator.choices(range(1, 9), k=generator.randint(0, longest)), END]


def stack(rows):
    """Lists of captions per image -> zero-padded tensor."""
    longest = max(len(ids) for captions in rows for ids in captions)
    return torch.tensor([[ids + [0] * (longest - len(ids)) for ids in captions]
                         for captions in rows])


def counts_of(ids):
    """{n-gram: count} of a caption without <start>."""
    return Counter(tuple(ids[i:i + n]) for n in range(1, 5) for i in range(1, len(ids) - n + 1))


def plain_cider_d(ids, references, documents):
    """CIDEr-D of one caption; documents: the references of every image."""
    frequency = Counter(ngram for captions in documents
                        for ngram in set().union(*(counts_of(caption) for caption in captions)))

    def vector(ids):
        weights = [{} for _ in range(4)]
        for ngram, count in counts_of(ids).items():
            idf = log(len(documents)) - log(max(1.0, frequency[ngram]))
            weights[len(ngram) - 1][ngram] = count * idf
        norms = [sqrt(sum(w * w for w in part.values())) for part in weights]
        return weights, norms, max(len(ids) - 2, 0)

    tf_idf, norm, length = vector(ids)
    total = 0
    for reference in references:
        other, other_norm, other_length = vector(reference)
        for n in range(4):
            pairs = [(w, other[n].get(ngram, 0)) for ngram, w in tf_idf[n].items()]
            value = sum(min(w, v) * v for w, v in pairs)
            if norm[n] and other_norm[n]:
                value /= norm[n] * other_norm[n]
            total += value * exp(-(length - other_length) ** 2 / (2 * 6.0 ** 2))
    return 10 * total / 4 / len(references)


@pytest.fixture(scope="module")
def documents():
    generator = random.Random(0)
    return [[caption(generator) for _ in range(3)] for _ in range(30)]


@pytest.fixture(scope="module")
def reward(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "document_frequencies_x.hdf5"
    write_frequencies(path, stack(documents).numpy(), V)
    return CiderD(path, V)


def test_equals_a_plain_implementation(documents, reward):
    generator = random.Random(1)
    captions = [[*(caption(generator) for _ in range(4)), references[1]]
                for references in documents]
    captions[0][0] = [START, 5]         # cut off before <end>
    captions[1][0] = [START, END]       # an empty caption
    scores = reward(stack(captions)[..., 1:], stack(documents)[..., 1:])
    expected = [[plain_cider_d(ids, references, documents) for ids in image_captions]
                for image_captions, references in zip(captions, documents, strict=True)]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-6)
    assert scores.shape == (30, 5) and scores.max() > 3 and (scores >= 0).all()


def test_equals_pycocoevalcap(documents, reward):
    """Which computes document frequencies of the references given: here all training captions."""
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    generator = random.Random(2)
    captions = [[caption(generator)] for _ in documents]

    def text(ids):
        return " ".join(map(str, ids[1:]))
    texts = {i: [text(ids) for ids in references] for i, references in enumerate(documents)}
    results = {i: [text(ids)] for i, (ids,) in enumerate(captions)}
    _, expected = cider.compute_score(texts, results)
    scores = reward(stack(captions)[..., 1:], stack(documents)[..., 1:])[:, 0]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("captions_per_image", [1, 5, 7])
def test_the_reward_is_of_each_of_an_image_s_own_captions_once(tmp_path, count, captions_per_image):
    """Whatever --captions_per_image, of up to `count` captions, from preparedataset.py's file."""
    generator = random.Random(count)
    words = build([list("abcdefgh")], 1)
    records = []
    for i in range(30):
        texts = [generator.choices("abcdefgh", k=generator.randint(3, 9))
                 for _ in range(1 + i % count)]
        raw = [" ".join(tokens) for tokens in texts]
        records.append(Record(f"{i}.jpg", f"{i}.jpg", "train", texts, raw))
    write_json(dataset.wordmap_path(tmp_path, "x"), words.wordmap)
    ids = dataset.write_split(dataset.split_path(tmp_path, "x", "train"), records, words,
                              captions_per_image, 20, 1, None)
    write_frequencies(tmp_path / "frequencies.hdf5", ids, len(words))
    own = dataset.CaptionDataset(tmp_path, "x", "train").own_captions()

    references = [[words.encode(tokens, 20) for tokens in record.tokens] for record in records]
    captions = [[texts[-1]] for texts in references]
    expected = [[plain_cider_d(texts[-1], texts, references)] for texts in references]
    scores = CiderD(tmp_path / "frequencies.hdf5", len(words))(stack(captions)[..., 1:],
                                                               own[..., 1:])
    np.testing.assert_allclose(scores.numpy(), expected, rtol=0, atol=1e-6)


def test_frequencies_of_another_vocabulary_are_refused(documents, reward, tmp_path):
    write_frequencies(tmp_path / "x.hdf5", stack(documents).numpy(), V + 1)
    with refused("15 words, not 14"):
        CiderD(tmp_path / "x.hdf5", V)
    with refused("no such file.*preparedataset.py"):
        CiderD(tmp_path / "missing.hdf5", V)
    with h5py.File(tmp_path / "x.hdf5", "a") as file:
        del file["counts_3"]
    with refused("counts_3"):
        CiderD(tmp_path / "x.hdf5", V + 1)
    with refused("--min_word_freq"):
        write_frequencies(tmp_path / "y.hdf5", stack(documents).numpy(), 60_000)
