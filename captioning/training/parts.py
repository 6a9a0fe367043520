"""Batches that several processes compute together, each its own part in one pass or several."""
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from captioning import processes


class Part(NamedTuple):
    """The images of a batch that one process computes in one pass.

    Losses take the captions of the whole batch: they count its words, and draw its random numbers, without asking the
    other processes, and return the part's share of the whole batch's loss. The shares of all parts add up to it.
    """
    images: slice | torch.Tensor = slice(None)   # or their indices in the batch
    generator: torch.Generator | None = None     # of random numbers for the whole batch, the same in all its parts
    size: int | None = None                      # images of the whole batch; None: this part is the whole batch
    passes: int = 1                              # of each process
    share: float = 1.0      # of the results: below 1 if several parts have the same images
    step: int = 0           # number of steps before this one, in all epochs
    index: torch.Tensor | None = None            # numbers of the part's images in the data set

    def exponential(self, like):
        """Exponentially distributed random numbers of the shape and type of `like` (B, ...), for the part's images."""
        whole = like.new_empty(self.size or len(like), *like.shape[1:])
        return whole.exponential_(generator=self.generator)[self.images]

    def select(self, chosen):
        """This part with those of its images for which `chosen` (B,) is True."""
        size = self.size or len(chosen)
        images = torch.arange(size, device=chosen.device)[self.images][chosen]
        return self._replace(images=images, size=size, index=None if self.index is None else self.index[chosen.cpu()])


WHOLE = Part()


def own_slices(size, passes):
    """[(slice, share)] of this process's passes over a batch of `size` images: consecutive images, as equally many as
    possible. If there are fewer images than parts, each part has all of them and counts only for a share."""
    count = processes.count() * passes
    if size < count:
        return [(slice(0, size), 1 / count)] * passes
    bounds = [size * i // count for i in range(count + 1)]
    first = processes.rank() * passes
    return [(slice(bounds[i], bounds[i + 1]), 1.0) for i in range(first, first + passes)]


class PartsOfBatches(Dataset):
    """A CaptionDataset indexed by (indices of a batch, slice): whole batches of captions, images of the slice."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitems__(self, item):
        return self.data.__getitems__(*item)


class Loss(nn.Module):
    """The loss of a model on a batch: what DistributedDataParallel wraps.

    forward: images of the part, captions of the whole batch -> loss, correct words and words of the part."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def train(self, mode=True):
        """An encoder that is not trained stays in evaluation mode, so that its batch-norms do not move."""
        super().train(mode)
        encoder = self.model.encoder
        if encoder is not None and not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()
        return self

    def forward(self, images, captions, epoch, part):
        results = self.function(self.model, self.model.encode(images), captions, epoch, part)
        return tuple(result * part.share for result in results)
