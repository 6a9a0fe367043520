"""CIDEr-D (Vedantam et al. 2015) of token ids, a batch at once: the reward of self-critical training."""
import io
import math
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.nn import functional as F

from captioning.data.hdf5 import open_hdf5, reading
from captioning.errors import InputError
from captioning.files import atomic_path

N, SIGMA = 4, 6.0           # longest n-grams; width of the penalty for another length


def frequencies_path(data_folder, dataset):
    return Path(data_folder) / dataset / f"document_frequencies_{dataset}.hdf5"


def ngrams(ids, n, V):
    """ids (..., L) zero-padded -> keys (..., L − n + 1) of n-grams as numbers to the base V, 0 where one is not whole.

    Works on numpy arrays and tensors of 64-bit integers.
    """
    count = max(ids.shape[-1] - n + 1, 0)
    keys = ids[..., :count]
    for i in range(1, n):
        keys = keys * V + ids[..., i:i + count]
    return keys * (ids[..., n - 1:] != 0)


def write_frequencies(path, captions, V):
    """In how many of the images each n-gram of their captions (images, R, L), ids with <start> and <end>, occurs.

    `keys_<n>` sorted, `counts_<n>`, without those of one image, which weigh as unseen ones do; <end> counts as a word.
    """
    if V ** N >= 2 ** 63:
        raise InputError(f"{V} words are more than CIDEr-D's n-grams are made for: raise --min_word_freq")
    buffer = io.BytesIO()       # HDF5 itself may crash on a full disk
    with h5py.File(buffer, "w") as file:
        file.attrs.update(images=len(captions), words=V)
        for n in range(1, N + 1):
            keys = np.sort(ngrams(captions[..., 1:].astype(np.int64), n, V).reshape(len(captions), -1), axis=1)
            keys[:, 1:][keys[:, 1:] == keys[:, :-1]] = 0                               # once an image
            keys, counts = np.unique(keys[keys != 0], return_counts=True)
            for name, values in (("keys", keys[counts > 1]), ("counts", counts[counts > 1].astype(np.int32))):
                file.create_dataset(f"{name}_{n}", data=values, compression="gzip", shuffle=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


class CiderD:
    """CIDEr-D with document frequencies of training references, in float64 on the CPU.

    path: what write_frequencies wrote for a vocabulary of V words; InputError if it is missing or was made for another.
    """

    def __init__(self, path, V):
        names = [f"{name}_{n}" for n in range(1, N + 1) for name in ("keys", "counts")]
        with open_hdf5(path, names) as file, reading(path):
            if file.attrs["words"] != V:
                raise InputError(f"{path} was made for a vocabulary of {file.attrs['words']} words, not {V}: run "
                                 "preparedataset.py again")
            self.V, self.log_images = V, math.log(file.attrs["images"])
            self.tables = [(torch.from_numpy(file[f"keys_{n}"][:]), torch.from_numpy(file[f"counts_{n}"][:]))
                           for n in range(1, N + 1)]

    def __call__(self, captions, references):
        """captions (B, S, T) and references (B, R, L), ids without <start>, zero-padded -> scores (B, S), the mean over
        lengths of n-grams and over references of ten times the clipped cosine of tf-idf vectors."""
        S, longest = captions.shape[1], max(captions.shape[-1], references.shape[-1], N)
        ids = torch.cat([F.pad(part.long().cpu(), (0, longest - part.shape[-1])) for part in (captions, references)], 1)
        cosines = 0
        for n, table in enumerate(self.tables, start=1):
            vectors = self.tf_idf(ngrams(ids, n, self.V), table)                       # (B, S + R, M)
            norms = vectors.norm(dim=-1)
            h, r = vectors[:, :S, None], vectors[:, None, S:]
            norm = norms[:, :S, None] * norms[:, None, S:]                             # (B, S, R)
            product = (torch.minimum(h, r) * r).sum(-1)
            cosines = cosines + torch.where(norm == 0, 0, product / norm)
        lengths = ((ids != 0).sum(-1) - 1).clamp(min=0).double()
        difference = lengths[:, :S, None] - lengths[:, None, S:]
        return (10 / N * cosines * torch.exp(-difference ** 2 / (2 * SIGMA ** 2))).mean(-1)

    def tf_idf(self, keys, table):
        """n-grams (B, S, P) -> vectors (B, S, M) over the at most M different ones of each image."""
        known, frequencies = table
        ordered, order = keys.flatten(1).sort(dim=1)                                   # (B, M)
        new = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
        place = torch.empty_like(order).scatter_(1, order, new.cumsum(1))              # of each n-gram in the vectors
        tf = torch.zeros(*keys.shape[:2], place.shape[1], dtype=torch.float64)
        tf.scatter_add_(2, place.view(keys.shape), (keys != 0).double())
        frequency = torch.ones(ordered.shape, dtype=torch.float64)
        if len(known):
            found = torch.searchsorted(known, ordered).clamp_(max=len(known) - 1)
            frequency = torch.where(known[found] == ordered, frequencies[found], frequency)
        idf = torch.zeros_like(frequency).scatter_(1, new.cumsum(1), self.log_images - frequency.log())
        return tf * idf[:, None]
