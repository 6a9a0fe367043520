"""Region features of photographs by one of torchvision's detectors, for people who have nothing but photographs."""
from pathlib import Path
from urllib.error import URLError

import torch
from torch.utils.data import DataLoader
from torchvision import ops
from torchvision.models import detection
from torchvision.transforms.v2 import functional as T
from tqdm import tqdm

from captioning.data import images
from captioning.data.feature_store import FLOAT16_MAX, Store, file_size, weights_fingerprint
from captioning.data.loader import collate
from captioning.errors import InputError
from captioning.explanation.encoders import read_weights
from captioning.files import fingerprint

DETECTORS = ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn")
PROPOSALS = 300     # a photograph, before the suppression of overlapping ones
OVERLAP = 0.7       # of two regions at most: intersection over union


def build(name, weights=None):
    """The detector `name` with COCO's weights from torchvision, or from a file with torchvision's names."""
    # no proposal is too unsure: every photograph has regions
    model = detection.__dict__[name](weights=None, weights_backbone=None, rpn_post_nms_top_n_test=PROPOSALS,
                                     rpn_score_thresh=0.0)
    if weights is None:
        from torchvision import models
        try:
            state = models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(f"the weights of {name} cannot be downloaded ({error}): name a local file with "
                             "--detector_weights") from error
    else:
        state = read_weights(weights, "detector")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"the detector weights {weights or name} do not fit {name} ({reason}): name the right "
                         "--detector") from error
    return model.eval()


class Photographs:
    """Photographs of a folder, batch by batch: a list of float32 (3, H, W) in [0, 1], each of its own size."""

    def __init__(self, folder, paths):
        self.folder, self.paths = folder, paths

    def __len__(self):
        return len(self.paths)

    def __getitems__(self, indices):
        return [T.to_dtype(images.read_image(Path(self.folder, self.paths[i])), torch.float32, scale=True)
                for i in indices]


def store(path, records, image_folder, detector, name, regions, batch_size, workers, device):
    """Features (N, regions, C) float16, boxes and counts as bottom_up.store writes them; goes on where it stopped."""
    attributes = {"encoder": "bottom_up", "detector": name, "weights_of_detector": weights_fingerprint(detector),
                  "names": fingerprint([record.name for record in records])}
    marks = [1 + file_size(Path(image_folder, record.path)) for record in records]
    detector, C = detector.to(device), detector.roi_heads.box_predictor.cls_score.in_features
    with Store(path, marks, (regions, C), attributes, with_boxes=True) as store, torch.inference_mode():
        rows = list(range(store.done, len(records)))
        batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        loader = DataLoader(Photographs(image_folder, [record.path for record in records]), batch_sampler=batches,
                            collate_fn=collate, num_workers=min(workers, len(batches)))
        bar = tqdm(zip(batches, loader, strict=True), desc=Path(path).name, total=len(batches), unit="batch")
        for batch, photographs in bar:
            features, boxes, counts = best_regions(detector, [photo.to(device) for photo in photographs], regions)
            store.write(batch[0], features.clamp(-FLOAT16_MAX, FLOAT16_MAX).half().cpu().numpy(), boxes.cpu().numpy(),
                        counts.cpu().numpy())


def best_regions(detector, photographs, regions):
    """photographs, a list of B (3, H, W) -> features (B, regions, C), boxes (B, regions, 4) in the photographs' pixels,
    zero-padded, and counts (B,).

    The detector's proposals by their surest class, after non-maximum suppression; a region's features are what its box
    head makes of the pooled feature maps (Anderson et al. 2018 take the same of their detector).
    """
    heads = detector.roi_heads
    resized, _ = detector.transform(photographs)
    maps = detector.backbone(resized.tensors)
    proposals, _ = detector.rpn(resized, maps)
    pooled = heads.box_head(heads.box_roi_pool(maps, proposals, resized.image_sizes))  # (all proposals, C)
    logits, _ = heads.box_predictor(pooled)
    scores = logits.softmax(-1)[:, 1:].amax(-1)                                        # class 0 is the background
    owner = torch.repeat_interleave(torch.tensor([len(own) for own in proposals], device=pooled.device))
    flat = torch.cat(proposals)
    kept = ops.batched_nms(flat, scores, owner, OVERLAP)                               # the surest first
    order = kept[owner[kept].argsort(stable=True)]
    rank = torch.arange(len(order), device=order.device)
    counts = owner[order].bincount(minlength=len(photographs))
    rank = rank - (counts.cumsum(0) - counts)[owner[order]]                            # within its photograph
    order, rank = order[rank < regions], rank[rank < regions]
    features = pooled.new_zeros(len(photographs), regions, pooled.shape[1])
    features[owner[order], rank] = pooled[order]
    scale = torch.tensor([[w / W, h / H] * 2 for (h, w), (H, W) in zip(
        [photo.shape[1:] for photo in photographs], resized.image_sizes, strict=True)], device=flat.device)
    boxes = flat.new_zeros(len(photographs), regions, 4)
    boxes[owner[order], rank] = flat[order] * scale[owner[order]]
    return features, boxes, counts.clamp(max=regions)
