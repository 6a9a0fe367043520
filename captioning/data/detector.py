"""Computes region features with one of torchvision's object detectors and stores them."""
import torch

from captioning.data.feature_store import FLOAT16_MAX, store_of_images, weights_fingerprint
from captioning.data.images import read_image
from captioning.errors import InputError
from captioning.files import shortened
from captioning.weights import download_weights, read_weights

DETECTORS = ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn")
PROPOSALS = 300     # per image, before non-maximum suppression
OVERLAP = 0.7       # largest intersection over union of two regions


def build(name, weights=None):
    """Builds the detector `name` with the weights of a file (default: COCO's of torchvision)."""
    from torchvision.models import detection  # slow to import
    # no threshold for proposals, so that every image has regions
    model = detection.__dict__[name](weights=None, weights_backbone=None, rpn_score_thresh=0.0,
                                     rpn_post_nms_top_n_test=PROPOSALS)
    if weights is None:
        state = download_weights(name, "DEFAULT", "--detector_weights")
    else:
        state = read_weights(weights, "detector")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"the detector weights do not fit {name} ({shortened(error)}): give "
                         "--detector_weights of this --detector") from error
    return model.eval()


def store(path, records, image_folder, detector, name, regions, batch_size, workers, device):
    """Stores features, boxes and counts of the records' images as `bottom_up.store` does."""
    attributes = {"encoder": "bottom_up", "detector": name,
                  "weights_of_detector": weights_fingerprint(detector)}
    detector = detector.to(device)
    C = detector.roi_heads.box_predictor.cls_score.in_features

    @torch.inference_mode()
    def encode(batch):
        images = [image.to(device) for image in batch]
        features, boxes, counts = best_regions(detector, images, regions)
        features = features.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        return {"features": features.cpu().numpy(), "boxes": boxes.cpu().numpy(),
                "counts": counts.cpu().numpy()}

    store_of_images(path, records, image_folder, (regions, C), attributes, encode, read,
                    batch_size, workers, device, with_boxes=True)


def read(paths):
    """List of images, float32 (3, H, W) in [0, 1]."""
    return [read_image(path) / 255 for path in paths]


def best_regions(detector, batch, regions):
    """The highest-scoring regions of each image after non-maximum suppression of the proposals.

    As in Anderson et al. (2018), a region's score is the probability of its most probable class,
    and its features are the output of the detector's box head. batch: B images, float32 (3, H, W)
    in [0, 1]. Returns features (B, regions, C) and boxes (B, regions, 4) in pixels of the image,
    both zero-padded, and counts (B,) of regions."""
    from torchvision import ops  # slow to import
    heads = detector.roi_heads
    resized, _ = detector.transform(batch)
    maps = detector.backbone(resized.tensors)
    proposals, _ = detector.rpn(resized, maps)
    pooled = heads.box_head(heads.box_roi_pool(maps, proposals, resized.image_sizes))
    logits, _ = heads.box_predictor(pooled)
    scores = logits.softmax(-1)[:, 1:].amax(-1)     # class 0 is the background

    features = pooled.new_zeros(len(batch), regions, pooled.shape[1])
    boxes = pooled.new_zeros(len(batch), regions, 4)
    counts = torch.zeros(len(batch), dtype=torch.int64)
    sizes = [len(corners) for corners in proposals]
    of_images = zip(batch, resized.image_sizes, proposals, scores.split(sizes),
                    pooled.split(sizes), strict=True)
    for b, (image, (H, W), corners, score, feature) in enumerate(of_images):
        best = ops.nms(corners, score, OVERLAP)[:regions]       # by descending score
        n = len(best)
        h, w = image.shape[1:]
        scale = corners.new_tensor([w / W, h / H] * 2)      # from the resized to the given image
        features[b, :n] = feature[best]
        boxes[b, :n] = corners[best] * scale
        counts[b] = n
    return features, boxes, counts
