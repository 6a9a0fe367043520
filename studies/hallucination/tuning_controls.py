"""Fine-tuning with a control: finetune.py with a further flag, python studies/tuning_controls.py --control CONTROL …

Controls of --erase_tune, which differ in what the erased image is, or (other_words) what it must predict:
    mask          evidence is the share of a region that the object covers in the demo's segmentation masks
    soft          regions are erased in part: by the word's share of the relevance of all object words of the caption
    other_words   κ (--keep_weight) weights the cross-entropy of the caption's other object words, in their places
    image_swap    the whole image is replaced by another of the batch, whose caption does not name the object; κ is 0
    no_image      the whole image is replaced by (almost) zeros; κ is 0
Controls of --lrp_tune, which differ in p̃ (docs/method.md, section 7):
    temperature   softmax(z/T) of the logits z, with the T that gives the words of a batch the mean confidence of p̃
    permuted      the entries of each ω in random order
"""
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
from captioning.data import images
from captioning.errors import InputError, run_script
from captioning.experiments.localisation import Masks
from captioning.explanation.lrp_inference import weighted_hidden, weights
from captioning.metrics.object_words import NO_OBJECT, load_objects
from captioning.recurrence import word_rows
from captioning.training.erasure import fractions, is_other
from captioning.training.losses import count_words, cross_entropy, teacher_forced_loss, word_loss

CONTROLS = {"mask": "erase_tune", "soft": "erase_tune", "other_words": "erase_tune", "image_swap": "erase_tune",
            "no_image": "erase_tune", "temperature": "lrp_tune", "permuted": "lrp_tune"}


def get_args_parser():
    parser = finetune.get_args_parser()
    parser.add_argument("--control", choices=CONTROLS, required=True, help="of --erase_tune: what is erased or, with "
                        "other_words, what must be predicted; of --lrp_tune, temperature and permuted: what replaces p̃")
    return parser


class MaskCoverage:
    """What replaces `ErasureLoss.relevance`: the share of each region that the objects of a category cover.

    data: the training split of a data set with segmentation masks; objects: its Objects.
    """

    def __init__(self, data, objects):
        folder = data.path.parent
        self.data, self.masks = data, Masks(folder / f"masks_{folder.name}.hdf5", "train", len(data))
        names = sorted(set(objects.words.values()) - {NO_OBJECT})
        if missing := set(names) - self.masks.numbers.keys():
            raise InputError(f"there are no masks of {', '.join(sorted(missing))}: omit --synonyms")
        self.numbers = torch.tensor([self.masks.numbers[name] for name in names])

    def __call__(self, model, features, choice, part):
        """(B, S, K) for the words of a Choice, from 0 to 1."""
        things = F.pad(self.masks.things[part.index], (1, 0))                          # (B, objects + 1), 0 at first
        pixels = self.masks.pixels[part.index].long()                                  # (B, H, W)
        shown = things.gather(1, pixels.flatten(1)).view_as(pixels)                    # the category at each pixel
        named = self.numbers.to(choice.categories.device)[choice.categories].cpu()     # of −1: any, which is not used
        inside = (shown[:, None] == named[..., None, None]).float()                    # (B, S, H, W)
        if self.data.augment and not self.data.features:
            seeds = [self.data._seed(i, "picture") for i in part.index.tolist()]
            flipped = images.augment(torch.zeros(len(seeds), 3, 1, 1, dtype=torch.uint8), seeds)[1]
            inside = torch.where(flipped[:, None, None, None], inside.flip(-1), inside)
        side = round(features.shape[1] ** 0.5)
        return F.adaptive_avg_pool2d(inside, side).flatten(2).to(features.device)


def soft_evidence(relevance, categories, count):
    """What replaces `ErasureLoss.assign`: (B, K) the first word's positive relevance as a share of its own and that of
    all words of other categories, each as a fraction of its maximum; 0 but for the `count` most relevant regions.

    relevance (B, S, K); categories (B, S), −1 for none; count: a number, or one per image (B, 1)."""
    share = fractions(relevance)
    others = (share * is_other(categories)[..., None]).sum(1)                          # (B, K)
    part = share[:, 0] / (share[:, 0] + others).clamp(min=torch.finfo(share.dtype).tiny)
    rank = (part * share[:, 0]).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return part * (rank < count)


def other_words_loss(erased_loss, categories, weight, model, features, choice, part):
    """What replaces `ErasureLoss.erased_loss`, here with κ = 0: its term of μ, and `weight` times the cross-entropy of
    the object words of other categories, −log p'(o). categories (V,): see ErasureLoss."""
    named, category = categories[choice.caption], choice.categories[:, :1]             # (B, T+1), (B, 1)
    is_kept = is_other(choice.categories).any(1, keepdim=True) & (named >= 0) & (named != category)
    captions, others = choice.caption[part.images][:, None], choice.caption * is_kept
    return erased_loss(model, features, choice, part) + weight * cross_entropy(
        model, model.teacher_force(features, captions), others[part.images][:, None],
        total=count_words(others).clamp(min=1))[0]


def image_swap(model, features, choice, part):
    """What replaces `ErasureLoss.erase`: for each image the features (K, C) of another one of the part, at random among
    those whose chosen caption does not name the object; its own features if there is none."""
    names_it = (choice.categories[:, :1, None] == choice.categories).any(-1)           # (B, B)
    drawn = part.exponential(features.new_empty(len(features), len(features))).masked_fill(names_it, torch.inf)
    own = torch.arange(len(features), device=features.device)
    return features[torch.where(names_it.all(1), own, drawn.argmin(1))]


def no_image(model, features, choice, part):
    """What replaces `ErasureLoss.erase`: the smallest positive number (B, K, C), as regions of zeros are padding."""
    return torch.full_like(features, torch.finfo(features.dtype).tiny)


def control_loss(model, trace, captions, stop, weight, control, total=None):
    """CE(p, y) + weight · CE(control, y) in place of `lrp_loss`: stop words have the same probabilities in both."""
    rows = word_rows(captions)
    c_hat, h, hidden = (part.flatten(0, -2)[rows] for part in (trace.c_hat, trace.h, trace.hidden))    # (n, d)
    targets, mask = captions[..., 1:].flatten()[rows], model.dropout(torch.ones_like(hidden))
    logits = model.W_o(mask * hidden)                                                  # (n, V)
    words = logits.argmax(-1)
    if control == "permuted":
        omega_c, omega_h = (omega.gather(-1, torch.rand_like(omega).argsort(-1))
                            for omega in weights(model, c_hat, h, words, stop))
        changed = model.W_o(mask * (omega_c * c_hat + omega_h * h))
    else:
        is_weighted = ((targets != 0) & ~stop[words])[:, None]
        with torch.no_grad():
            weighted = model.W_o(mask * weighted_hidden(model, c_hat, h, words, stop))
            scale = inverse_temperature(logits[is_weighted[:, 0]].float(), confidence(weighted[is_weighted[:, 0]]))
        changed = torch.where(is_weighted, logits * scale, logits)
    loss, *counts = word_loss(logits, targets, total=total)
    return loss + weight * word_loss(changed, targets, total=total)[0], *counts


def confidence(logits):
    """Mean probability of the most probable word; logits (n, V)."""
    return logits.float().softmax(-1).amax(-1).mean()


def inverse_temperature(logits, mean):
    """1/T at which softmax(z/T) of the logits z (n, V) has the confidence `mean`, by bisection: it grows with 1/T."""
    low, high = torch.zeros_like(mean), torch.full_like(mean, 100.0)
    for _ in range(30):
        middle = (low + high) / 2
        is_low = confidence(logits * middle) < mean
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return low


def make_loss(settings, vocabulary, data, stop, device):
    """`finetune.make_loss` with the control; InputError if it belongs to another mode."""
    mode = CONTROLS[settings.control]
    if not getattr(settings, mode):
        raise InputError(f"--control {settings.control} is a control of --{mode}: give this mode")
    if mode == "lrp_tune":
        criterion = partial(control_loss, stop=stop, weight=settings.lrp_weight, control=settings.control)
        return teacher_forced_loss(vocabulary, criterion, settings.ss_prob, settings.region_loss,
                                   settings.region_epochs), "accuracy"
    loss, measure = finetune.make_loss(settings, vocabulary, data, stop, device)
    if settings.control == "mask":
        loss.relevance = MaskCoverage(data, load_objects(settings.data_folder, settings.dataset, {}, settings.synonyms))
    elif settings.control == "soft":
        loss.assign = soft_evidence
    elif settings.control == "other_words":
        loss.keep = 0.0
        loss.erased_loss = partial(other_words_loss, loss.erased_loss, loss.categories, settings.keep_weight)
    else:
        loss.keep = 0.0     # such images do not show what the rest of the caption says
        loss.erase = {"image_swap": image_swap, "no_image": no_image}[settings.control]
    return loss, measure


if __name__ == "__main__":
    run_script(partial(finetune.main, make_loss=make_loss), get_args_parser().parse_args())
