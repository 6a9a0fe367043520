"""finetune.py with a control: python studies/hallucination/tuning_controls.py --control CONTROL …

Controls of --erase_tune, which differ in the erased image:
    mask          evidence: the share of a region that the object covers in the segmentation masks
    image_swap    another image of the batch, whose caption does not name the object; κ is 0
    no_image      (almost) zeros; κ is 0
Controls of --lrp_tune, which differ in p̃ (docs/method.md, section 7):
    temperature   softmax(z/T) of the logits z, with the T that gives words the confidence of p̃
    permuted      the entries of each ω in random order
"""
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))
import finetune
from captioning.data import images
from captioning.decoding import uniform
from captioning.errors import InputError, run_script
from captioning.experiments.mask_mass import Masks
from captioning.explanation.lrp_inference import weighted_hidden, weights
from captioning.metrics.object_words import NO_OBJECT, load_objects
from captioning.training.erasure import ErasureLoss
from captioning.training.losses import LRPInferenceLoss, word_loss, word_rows


class MaskErasure(ErasureLoss):
    """Erases the regions that the object covers; `masks` and `data` are set by make_loss."""

    def relevance(self, model, features, choice):
        """(B, S, K) the share of each region that the objects of each word's category cover."""
        index = choice.index.cpu()
        things = F.pad(self.masks.things[index], (1, 0))            # (B, objects + 1), 0 at first
        pixels = self.masks.pixels[index].long()                    # (B, H, W)
        shown = things.gather(1, pixels.flatten(1)).view_as(pixels)     # the category at each pixel
        named = self.numbers[choice.categories.cpu()]               # of −1: any, it is not used
        inside = (shown[:, None] == named[..., None, None]).float()     # (B, S, H, W)
        if self.data.augment and not self.data.features:
            seeds = [self.data._seed(i, "picture") for i in index.tolist()]
            blank = torch.zeros(len(seeds), 3, 1, 1, dtype=torch.uint8)
            is_flipped = images.augment(blank, seeds)[1]
            inside = torch.where(is_flipped[:, None, None, None], inside.flip(-1), inside)
        side = round(features.shape[1] ** 0.5)
        return F.adaptive_avg_pool2d(inside, side).flatten(2).to(features.device)


class ImageSwap(ErasureLoss):
    """Replaces each image by a random other one whose caption does not name the object, if any."""

    def erase(self, model, features, choice):
        first = choice.categories[:, :1, None]
        names_it = (first == choice.categories).any(-1)                                # (B, B)
        numbers = uniform(choice.seeds + 2, (len(features),), features.device)
        drawn = numbers.masked_fill(names_it, torch.inf).argmin(1)
        own = torch.arange(len(features), device=features.device)
        return features[torch.where(names_it.all(1), own, drawn)]


class NoImage(ErasureLoss):
    """Replaces each region by the smallest positive number, as regions of zeros are padding."""

    def erase(self, model, features, choice):
        return torch.full_like(features, torch.finfo(features.dtype).tiny)


class ControlLoss(LRPInferenceLoss):
    """CE(p, y) + weight · CE(control, y); stop words have the same probabilities in both."""

    def word_loss(self, model, trace, captions):
        rows = word_rows(captions)
        c_hat, h, hidden = (x.flatten(0, -2)[rows] for x in (trace.c_hat, trace.h, trace.hidden))
        targets = captions[..., 1:].flatten()[rows]
        mask = model.dropout(torch.ones_like(hidden))       # p and its control have the same one
        logits = model.W_o(mask * hidden)                                              # (n, V)
        changed = self.changed_logits(model, c_hat, h, mask, logits, targets)
        loss, *log = word_loss(logits, targets)
        return loss + self.weight * word_loss(changed, targets)[0], *log


class Permuted(ControlLoss):
    def changed_logits(self, model, c_hat, h, mask, logits, targets):
        omegas = weights(model, c_hat, h, logits.argmax(-1), self.stop)
        omega_c, omega_h = (x.gather(-1, torch.rand_like(x).argsort(-1)) for x in omegas)
        return model.W_o(mask * (omega_c * c_hat + omega_h * h))


class Temperature(ControlLoss):
    def changed_logits(self, model, c_hat, h, mask, logits, targets):
        words = logits.argmax(-1)
        is_weighted = (targets != 0) & ~self.stop[words]
        with torch.no_grad():
            weighted = model.W_o(mask * weighted_hidden(model, c_hat, h, words, self.stop))
            mean = confidence(weighted[is_weighted])
            scale = inverse_temperature(logits[is_weighted].float(), mean)
        return torch.where(is_weighted[:, None], logits * scale, logits)


def confidence(logits):
    """Mean probability of the most probable word; logits (n, V)."""
    return logits.float().softmax(-1).amax(-1).mean()


def inverse_temperature(logits, mean):
    """1/T at which softmax(z/T) of the logits z (n, V) has the confidence `mean`, by bisection."""
    low = torch.zeros_like(mean)
    high = torch.full_like(mean, 100.0)
    for _ in range(30):
        middle = (low + high) / 2
        is_low = confidence(logits * middle) < mean
        low = torch.where(is_low, middle, low)
        high = torch.where(is_low, high, middle)
    return low


CONTROLS = {"mask": MaskErasure, "image_swap": ImageSwap, "no_image": NoImage,
            "temperature": Temperature, "permuted": Permuted}
make_original_loss = finetune.make_loss


def make_loss(settings, model, vocabulary, data, device):
    """`finetune.make_loss` with the control; InputError if it belongs to another mode."""
    control = CONTROLS[settings.control]
    mode = "lrp_tune" if issubclass(control, LRPInferenceLoss) else "erase_tune"
    if settings.mode != mode:
        raise InputError(f"--control {settings.control} is a control of --{mode}: give this mode")
    loss = make_original_loss(settings, model, vocabulary, data, device)
    loss.__class__ = control
    if control is MaskErasure:
        objects = load_objects(settings.data_folder, settings.dataset, {}, settings.synonyms)
        folder = data.path.parent
        loss.data = data
        loss.masks = Masks(folder / f"masks_{folder.name}.hdf5", "train", len(data))
        names = sorted(set(objects.words.values()) - {NO_OBJECT})
        if missing := set(names) - loss.masks.numbers.keys():
            raise InputError(f"there are no masks of {', '.join(sorted(missing))}: omit --synonyms")
        loss.numbers = torch.tensor([loss.masks.numbers[name] for name in names])
    elif mode == "erase_tune":
        loss.keep_weight = 0.0      # such images do not show what the rest of the caption says
    return loss


def get_args_parser():
    parser = finetune.get_args_parser()
    parser.add_argument("--control", choices=CONTROLS, required=True, help="what is changed")
    return parser


if __name__ == "__main__":
    finetune.make_loss = make_loss
    run_script(finetune.main, get_args_parser().parse_args())
