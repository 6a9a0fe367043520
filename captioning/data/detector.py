"""Computes region features with one of torchvision's object detectors and stores them."""
from pathlib import Path

import torch
from torchvision import ops
from torchvision.models import detection
from torchvision.transforms.v2 import functional as T

from captioning.data import images
from captioning.data.feature_store import FLOAT16_MAX, Store, file_size, weights_fingerprint
from captioning.errors import InputError
from captioning.files import fingerprint, shortened
from captioning.weights import download_weights

DETECTORS = ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn")
PROPOSALS = 300     # per image, before non-maximum suppression
OVERLAP = 0.7       # largest intersection over union of two regions


def build(name, state=None):
    """Builds the detector `name` with the weights in `state`, a state_dict (default: COCO's weights of torchvision)."""
    # no threshold for proposals, so that every image has regions
    model = detection.__dict__[name](weights=None, weights_backbone=None, rpn_post_nms_top_n_test=PROPOSALS,
                                     rpn_score_thresh=0.0)
    if state is None:
        state = download_weights(name, "DEFAULT", "--detector_weights")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the detector weights do not fit {name} ({shortened(error)}): give --detector_weights of "
                         "this --detector") from error
    return model.eval()


class ImageLists:
    """Images of a folder by the batch: a list of float32 (3, H, W) in [0, 1], each in its own size."""

    def __init__(self, folder, paths):
        self.folder, self.paths = folder, paths

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, indices):
        return [T.to_dtype(images.read_image(Path(self.folder, self.paths[i])), torch.float32, scale=True)
                for i in indices]


def store(path, records, image_folder, detector, name, regions, batch_size, workers, device):
    """Stores features (N, regions, C) float16, boxes and counts of the records' images in the layout of
    `bottom_up.store`; resumes an interrupted run. name: the detector's name, stored with the features."""
    attributes = {"encoder": "bottom_up", "detector": name, "weights_of_detector": weights_fingerprint(detector),
                  "names": fingerprint([record.name for record in records])}
    marks = [1 + file_size(Path(image_folder, record.path)) for record in records]
    detector, C = detector.to(device), detector.roi_heads.box_predictor.cls_score.in_features
    data = ImageLists(image_folder, [record.path for record in records])

    def encode(batch):
        with torch.inference_mode():
            features, boxes, counts = best_regions(detector, [image.to(device) for image in batch], regions)
        features = features.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        return {"features": features.cpu().numpy(), "boxes": boxes.cpu().numpy(), "counts": counts.cpu().numpy()}
    with Store(path, marks, (regions, C), attributes, with_boxes=True) as store:
        store.fill(encode, data, batch_size, workers, device)


def best_regions(detector, batch, regions):
    """Selects the highest-scoring regions of each image after non-maximum suppression of the detector's proposals.

    A region's score is the probability of its most probable object class; its features are the output of the
    detector's box head for the pooled feature maps, as in Anderson et al. (2018).

    Args:
        batch: list of B images, float32 (3, H, W) in [0, 1].
        regions: maximum number of regions per image.

    Returns features (B, regions, C) and boxes (B, regions, 4) in pixels of the image, both zero-padded, and counts
    (B,), the number of regions.
    """
    heads = detector.roi_heads
    resized, _ = detector.transform(batch)
    maps = detector.backbone(resized.tensors)
    proposals, _ = detector.rpn(resized, maps)
    pooled = heads.box_head(heads.box_roi_pool(maps, proposals, resized.image_sizes))  # (all proposals, C)
    logits, _ = heads.box_predictor(pooled)
    scores = logits.softmax(-1)[:, 1:].amax(-1)                                        # class 0 is the background
    image_index = torch.repeat_interleave(torch.tensor([len(boxes) for boxes in proposals], device=pooled.device))
    flat = torch.cat(proposals)
    selected = ops.batched_nms(flat, scores, image_index, OVERLAP)                     # by descending score
    order = selected[image_index[selected].argsort(stable=True)]                       # by image, then by score
    image_index = image_index[order]
    rank = torch.arange(len(order), device=order.device)
    counts = image_index.bincount(minlength=len(batch))
    rank = rank - (counts.cumsum(0) - counts)[image_index]                             # within its image
    best = rank < regions
    order, image_index, rank = order[best], image_index[best], rank[best]
    features = pooled.new_zeros(len(batch), regions, pooled.shape[1])
    features[image_index, rank] = pooled[order]
    scale = torch.tensor([[w / W, h / H] * 2 for (h, w), (H, W) in zip(
        [image.shape[1:] for image in batch], resized.image_sizes, strict=True)], device=flat.device)
    boxes = flat.new_zeros(len(batch), regions, 4)
    boxes[image_index, rank] = flat[order] * scale[image_index]
    return features, boxes, counts.clamp(max=regions)
