"""CIDEr-D (Vedantam et al. 2015) of token ids, a batch at once: the reward of self-critical training."""
import io
import math
from pathlib import Path

import h5py
import numpy as np
import torch

from captioning.dataset import open_hdf5, reading
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
        """captions (B, S, T) and references (B, R, L), ids without <start>, zero-padded -> scores (B, S), ten at best
        per n-gram length, averaged over lengths and references."""
        captions, references = captions.long().cpu(), references.long().cpu()
        scores = 0
        for n, table in enumerate(self.tables, start=1):
            h, r = ngrams(captions, n, self.V), ngrams(references, n, self.V)          # (B, S, P), (B, R, Q)
            h_idf, r_idf = self.idf(h, table), self.idf(r, table)
            h_count, r_count = _counts(h, h), _counts(r, r)                            # of each n-gram in its sentence
            h_norm = (h_count * h_idf ** 2).sum(-1).sqrt()
            r_norm = (r_count * r_idf ** 2).sum(-1).sqrt()
            found = _counts(h[:, :, None], r[:, None])                                 # (B, S, R, P) in each reference
            tf = h_count[:, :, None]
            product = (torch.minimum(tf, found) * found * (h_idf ** 2)[:, :, None] / tf.clamp(min=1)).sum(-1)
            norms = h_norm[..., None] * r_norm[:, None]
            scores = scores + torch.where(norms == 0, 0, product / norms)              # (B, S, R)
        lengths = [((ids != 0).sum(-1) - 1).clamp(min=0).double() for ids in (captions, references)]
        difference = lengths[0][..., None] - lengths[1][:, None]
        return (10 / N * scores * torch.exp(-difference ** 2 / (2 * SIGMA ** 2))).mean(-1)

    def idf(self, keys, table):
        """log(images / images that have it), 0 for no n-gram."""
        known, counts = table
        if not len(known):
            return self.log_images * (keys != 0).double()
        place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
        frequency = torch.where(known[place] == keys, counts[place], 1).double()
        return (self.log_images - frequency.log()) * (keys != 0)


def _counts(keys, others):
    """How often each of keys (..., P) occurs among others (..., Q): float64 (..., P), 0 for no n-gram."""
    return ((keys[..., :, None] == others[..., None, :]) & (keys != 0)[..., None]).sum(-1).double()
