"""CIDEr-D (Vedantam et al. 2015) of batches of token ids: the reward of self-critical training."""
import io
import math
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.nn import functional as F

from captioning.data.arrays import open_hdf5, read_whole
from captioning.errors import InputError
from captioning.files import atomic_path, expect

N = 4               # longest n-grams
SIGMA = 6.0         # standard deviation of the length penalty, in words


def frequencies_path(data_folder, dataset):
    """Path of the document frequencies that preparedataset.py writes."""
    return Path(data_folder) / dataset / f"document_frequencies_{dataset}.hdf5"


def ngrams(ids, n, V):
    """The n-grams of zero-padded ids (..., L) as keys (..., L − n + 1), 0 for those with padding.

    Keys are numbers in base V. ids: a numpy array or a tensor of 64-bit integers.
    """
    count = max(ids.shape[-1] - n + 1, 0)
    keys = ids[..., :count]
    for i in range(1, n):
        keys = keys * V + ids[..., i:i + count]
    return keys * (ids[..., n - 1:] != 0)


def write_frequencies(path, captions, V):
    """Writes document frequencies: the number of images with a caption that contains an n-gram.

    captions: array (images, R, L) of ids from <start> to <end>, zero-padded, also where images have
    fewer than R captions; <end> counts as a word. The HDF5 file contains sorted `keys_<n>` and
    `counts_<n>` for n = 1..4; n-grams of a single image are omitted, as CIDEr-D gives them the same
    weight as unseen ones. InputError if V words are too many for 64-bit keys."""
    if V ** N >= 2 ** 63:
        raise InputError(f"a vocabulary of {V} words is too large for the 64-bit n-gram keys of "
                         "CIDEr-D: raise --min_word_freq")
    buffer = io.BytesIO()       # writing HDF5 directly may crash on a full disk
    with h5py.File(buffer, "w") as file:
        file.attrs.update(images=len(captions), words=V)
        for n in range(1, N + 1):
            keys = ngrams(captions[..., 1:].astype(np.int64), n, V)
            keys = np.sort(keys.reshape(len(captions), -1), axis=1)
            keys[:, 1:][keys[:, 1:] == keys[:, :-1]] = 0        # count once per image
            keys, counts = np.unique(keys[keys != 0], return_counts=True)
            tables = {f"keys_{n}": keys[counts > 1], f"counts_{n}": counts[counts > 1].astype("i4")}
            for name, values in tables.items():
                file.create_dataset(name, data=values, compression="gzip", shuffle=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


class CiderD:
    """CIDEr-D with the document frequencies of the training captions, in float64 on the CPU.

    path: a file of `write_frequencies` for a vocabulary of V words; InputError if it is missing,
    damaged or belongs to another vocabulary.
    """

    def __init__(self, path, V):
        names = [f"{name}_{n}" for n in range(1, N + 1) for name in ("keys", "counts")]
        with open_hdf5(path, names) as file:
            if file.attrs["words"] != V:
                raise InputError(f"{path} was computed for a vocabulary of {file.attrs['words']} "
                                 f"words, not {V}: run preparedataset.py again")
            self.V = V
            images = file.attrs["images"]
            arrays = [torch.from_numpy(read_whole(file, name, "iu")).long() for name in names]
            self.tables = list(zip(arrays[::2], arrays[1::2], strict=True))     # of each n
            self.log_images = math.log(images)
            for keys, counts in self.tables:
                expect(keys.dim() == 1 and keys.shape == counts.shape
                       and (keys[1:] > keys[:-1]).all() and (counts > 1).all()
                       and (counts <= images).all(), "its n-grams are not sorted or counted")

    def __call__(self, captions, references):
        """CIDEr-D (B, S) of captions (B, S, T) against references (B, R, L), without <start>.
        References without any id are padding, which does not count.

        Ten times the cosine similarity of clipped tf-idf vectors, times a Gaussian penalty for a
        difference in length, averaged over n = 1..4 and over the references."""
        S = captions.shape[1]
        longest = max(captions.shape[-1], references.shape[-1], N)
        ids = torch.cat([F.pad(x.cpu().long(), (0, longest - x.shape[-1]))
                         for x in (captions, references)], 1)                          # (B, S+R, L)
        cosines = 0
        for n, table in enumerate(self.tables, start=1):
            vectors = self.tf_idf(ngrams(ids, n, self.V), table)                       # (B, S+R, M)
            norms = vectors.norm(dim=-1)
            caption = vectors[:, :S, None]
            reference = vectors[:, None, S:]
            norm = norms[:, :S, None] * norms[:, None, S:]                             # (B, S, R)
            product = (torch.minimum(caption, reference) * reference).sum(-1)
            cosines = cosines + torch.where(norm == 0, 0, product / norm)
        lengths = ((ids != 0).sum(-1) - 1).clamp(min=0).double()        # without <end>
        difference = lengths[:, :S, None] - lengths[:, None, S:]
        penalty = torch.exp(-difference ** 2 / (2 * SIGMA ** 2))
        is_reference = (references != 0).any(-1).cpu()[:, None]                        # (B, 1, R)
        scores = 10 / N * cosines * penalty * is_reference
        return scores.sum(-1) / is_reference.sum(-1)

    def tf_idf(self, keys, table):
        """tf-idf vectors (B, S, M) of n-gram keys (B, S, P); M: the image's distinct n-grams."""
        known_keys, counts = table
        ordered, order = keys.flatten(1).sort(dim=1)                                   # (B, M)
        # the distinct n-grams are numbered in their order
        number = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0)).cumsum(1)
        entry = torch.empty_like(order).scatter_(1, order, number)      # of each key
        tf = torch.zeros(*keys.shape[:2], entry.shape[1], dtype=torch.float64)
        tf.scatter_add_(2, entry.view(keys.shape), (keys != 0).double())
        frequency = torch.ones(ordered.shape, dtype=torch.float64)
        if len(known_keys):
            nearest = torch.searchsorted(known_keys, ordered).clamp_(max=len(known_keys) - 1)
            frequency = torch.where(known_keys[nearest] == ordered, counts[nearest], frequency)
        idf = self.log_images - frequency.log()
        idf = torch.zeros_like(idf).scatter_(1, number, idf)
        return tf * idf[:, None]
