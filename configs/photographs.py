"""Merges Flickr8k and photographs of COCO into one file of annotations in Karpathy's format:
python -m configs.photographs FLICKR8K_ANNOTATIONS FLICKR8K_IMAGES COCO_CAPTIONS COCO_IMAGES OUTPUT

Flickr8k's training split and COCO's photographs but for the last 500, sorted by id, are for
training, the 500 for validation, and Flickr8k's test split for the test. Training captions of more
than 15 words are omitted, if an image has shorter ones: few describe, and they cost a third of the
time. Prints the folder that contains all images.
"""
import os

from captioning.cli import Parser
from captioning.data.annotations import coco_captions
from captioning.data.flickr8k import read_flickr8k
from captioning.data.vocabulary import tokenise
from captioning.errors import run_script
from captioning.files import write_json

VALIDATION = 500        # photographs of COCO
MAX_WORDS = 15          # of a training caption


def get_args_parser():
    parser = Parser(__doc__)
    for name in ("flickr8k_annotations", "flickr8k_images", "coco_captions", "coco_images",
                 "output"):
        parser.add_argument(name)
    return parser


def main(args):
    flickr8k = os.path.realpath(args.flickr8k_images)
    coco = os.path.realpath(args.coco_images)
    entries = []
    for record in read_flickr8k(args.flickr8k_annotations):
        if record.split != "val":
            entries.append((flickr8k, record.name, record.split, record.raw))
    names, captions = coco_captions(args.coco_captions)
    for number, (image_id, name) in enumerate(names.items()):
        split = "train" if number < len(names) - VALIDATION else "val"
        entries.append((coco, name, split, captions[image_id]))

    root = os.path.commonpath([flickr8k, coco])
    images = []
    for folder, name, split, texts in entries:
        if split == "train":
            texts = [text for text in texts if len(tokenise(text)) <= MAX_WORDS] or texts
        images.append({"filename": name, "filepath": os.path.relpath(folder, root),
                       "split": split, "sentences": [{"raw": text} for text in texts]})
    write_json(args.output, {"images": images})
    print(root)


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
