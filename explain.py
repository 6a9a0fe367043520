"""Captions pictures, shows why each word was said: python explain.py --weight output/checkpoint_best.pth --images ."""
import hashlib
import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning import checkpoint, decoding
from captioning.cli import Parser, add_device, add_seed, non_negative, positive_int, print_settings, set_seed
from captioning.data.dataset import CaptionDataset, features_path
from captioning.data.feature_store import check_features, weights_fingerprint
from captioning.data.images import preprocess, read_image
from captioning.data.vocabulary import tokenise
from captioning.device import pick_device
from captioning.errors import InputError, run_script
from captioning.explanation.methods import METHODS, NON_NEGATIVE, methods_for_regions, pixel_maps, region_relevance
from captioning.files import fingerprint, make_folder
from captioning.report.page import page_entry, sentence, write_page
from captioning.report.plots import draw_heatmaps, draw_words

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weight", required=True, help="checkpoint of a captioning model")
    add("--images", nargs="+", metavar="FILE_OR_FOLDER", help="pictures to caption and explain")
    add("--dataset", help="instead of --images: the pictures of a data set that preparedataset.py made")
    add("--data_folder", default="data", help="where preparedataset.py wrote it")
    add("--split", choices=["train", "val", "test"], default="test", help="which of its pictures")
    add("--max_images", type=positive_int, help="only so many pictures, the first")
    add("--methods", nargs="+", choices=METHODS, default=["lrp", "attention"], help="ways to explain")
    add("--caption", help="explain this sentence instead of the model's own")
    add("--contrast", metavar="WORD", help="explain why each word was said rather than this one")
    add("--decoding", choices=["greedy", "beam_search", "diverse_beam_search"], default="beam_search",
        help="how the model's own is found")
    add("--beam_size", type=positive_int, default=3, help="hypotheses a picture")
    add("--max_len", type=positive_int, default=50, help="words at most")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--eps", type=non_negative, default=0.01, help="of LRP's ε-rule")
    add("--batch_size", type=positive_int, default=8, help="pictures explained at once")
    add("--chunk", type=positive_int, help="words at once through the encoder, to bound memory")
    add("--skip_broken", action="store_true", help="pictures that cannot be read are left out; let this be no error")
    add("--overwrite", action="store_true", help="explain anew what is explained already")
    add("--save_path", default="output/explanations", help="a folder for every picture goes here")
    add_device(parser)
    add_seed(parser)
    return parser


def find_pictures(arguments):
    """Files named, and the pictures of folders named, by name."""
    paths = []
    for argument in map(Path, arguments):
        if argument.is_dir():
            found = sorted(path for path in argument.iterdir() if path.suffix.lower() in SUFFIXES)
            if not found:
                raise InputError(f"the folder {argument} holds no pictures ({', '.join(SUFFIXES)})")
            paths += found
        elif argument.exists():
            paths.append(argument)
        else:
            raise InputError(f"the picture {argument} does not exist: check --images")
    return list(dict.fromkeys(paths))


def folder_names(paths):
    """A folder's name for each picture: its stem, or its whole name and a number where stems are alike."""
    stems, names = Counter(path.stem for path in paths), []
    for number, path in enumerate(paths):
        name = path.stem if stems[path.stem] == 1 else f"{path.name}_{number}"
        while name in names:        # another picture's stem can look just like that
            name += "_"
        names.append(name)
    return names


def split_pictures(args):
    """Paths of the pictures of a data set's split."""
    data = CaptionDataset(args.data_folder, args.dataset, args.split)
    if not data.image_folder:
        raise InputError(f"{data.path} was prepared without a picture folder: run preparedataset.py with "
                         "--image_folder to explain its pictures")
    return [Path(data.image_folder, path) for path in data.paths]


def encode_caption(text, vocabulary, flag="--caption"):
    """ids (L,) from <start> to <end>; InputError that names words outside the vocabulary."""
    words = tokenise(text)
    unknown = [word for word in words if word not in vocabulary.wordmap]
    if unknown or not words:
        raise InputError(f"{flag} {text!r} has words outside the model's vocabulary: {', '.join(unknown)}" if unknown
                         else f"{flag} holds no words")
    return torch.tensor(vocabulary.encode(words, len(words)))


def contrast_word(text, vocabulary):
    """The id of --contrast; InputError if it is not one word that the model knows."""
    ids = encode_caption(text, vocabulary, "--contrast")
    if len(ids) != 3:
        raise InputError(f"--contrast {text!r} must be one word")
    return int(ids[1])


def open_regions(args, model):
    """The data set's split with the stored region features that the model needs."""
    if args.images:
        raise InputError(f"{args.weight} works on region features, not on pixels: give --dataset NAME, whose features "
                         "preparedataset.py --features bottom_up stored")
    args.methods = methods_for_regions(args.methods, args.weight)
    data = CaptionDataset(args.data_folder, args.dataset, args.split,
                          features=features_path(args.data_folder, args.dataset, args.split, "bottom_up"))
    check_features(data, model)
    return data


def captions_of(args, model, vocabulary, images):
    """(B, T+1) ids from <start> on: the user's sentence, or the model's own."""
    if args.caption is not None:
        return encode_caption(args.caption, vocabulary).to(images.device).expand(len(images), -1)
    with torch.no_grad():
        tokens = decoding.decode(model, model.encode(images), vocabulary, args.decoding, args.max_len,
                                 **({"beam_size": args.beam_size} if args.decoding != "greedy" else {}))
    return torch.cat([tokens.new_full((len(tokens), 1), vocabulary.start), tokens], dim=1)


def explain_batch(args, model, vocabulary, images):
    """images (B, 3, S, S), normalised, or features of regions (B, K, C) -> the arrays of each picture's
    explanation.npz, a list of B dicts."""
    captions = captions_of(args, model, vocabulary, images)
    lengths = (captions[:, 1:] != 0).sum(1).tolist()
    words = np.array(vocabulary.words)
    given = {"methods": np.array(args.methods), "contrast": np.array(args.contrast or "")}
    results = [given | {"words": words[row[:T + 1]]} for row, T in zip(captions.cpu().numpy(), lengths, strict=True)]
    options = {} if args.contrast is None else {"contrast": contrast_word(args.contrast, vocabulary)}
    for method in args.methods:
        own = {"eps": args.eps} if method == "lrp" else {}
        found = getattr(model, method)(images, captions, chunk=args.chunk, **options, **own)
        parts = {f"{method}_pixels": pixel_maps(found, method, tuple(images.shape[-2:]))} if images.dim() == 4 else {}
        if method != "attention" or images.dim() == 3:
            parts[f"{method}_regions"] = region_relevance(found, method)
        if method != "attention":
            parts[f"{method}_words"] = found.words
        if method == "lrp":
            parts["conservation"] = found.conservation
        p = found.logits.softmax(-1)                                                   # (B, T, V)
        best = p.topk(min(5, len(vocabulary)))
        parts |= {"logits": found.targets, "attention": found.attention, "alternatives": best.indices,
                  "probabilities": p.gather(2, captions[:, 1:, None]).squeeze(2),
                  "alternative_probabilities": best.values}
        for name, part in parts.items():
            part = part.float().cpu().numpy() if part.is_floating_point() else words[part.cpu().numpy()]
            for b, T in enumerate(lengths):
                results[b][name] = part[b, :T, :T] if name.endswith("_words") else part[b, :T]
    return results


def publish(folder, picture, arrays):
    """Writes the picture's folder; it appears whole. In one that is there already, a former explanation is replaced."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        write(make_folder(temporary), picture, arrays)
        if not folder.exists():
            os.replace(temporary, folder)
            return
        ours = {f"{prefix}{method}.png" for method in METHODS for prefix in ("", "words_")} | {"explanation.npz"}
        for name in ours:       # nothing else: the folder may hold files of the user's
            (folder / name).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.suffix == ".npz"):
            os.replace(path, folder / path.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): free some space or choose another "
                         "--save_path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(folder, picture, arrays):
    """One PNG a method, words_<method>.png and explanation.npz; picture: uint8 (3, H, W)."""
    words = arrays["words"].tolist()
    rather = f" rather than “{arrays['contrast']}”" if arrays["contrast"] else ""
    for method in arrays["methods"].tolist():
        title = f"{sentence(words)}{rather}   [{method}]"
        maps = arrays[f"{method}_regions" if "boxes" in arrays else f"{method}_pixels"]
        draw_heatmaps(folder / f"{method}.png", photograph(picture), words[1:], maps, title,
                      signed=method not in NON_NEGATIVE, boxes=arrays.get("boxes"))
        if method != "attention":
            draw_words(folder / f"words_{method}.png", words[:-1], words[1:], arrays[f"{method}_words"], title)
    np.savez_compressed(folder / "explanation.npz", **arrays)


def photograph(picture):
    """uint8 (3, H, W) -> (H, W, 3)."""
    return picture.permute(1, 2, 0).numpy()


def settings_of(args, model, regions):
    """What an explanation depends on besides its picture."""
    flags = ("methods", "caption", "contrast", "decoding", "beam_size", "max_len", "eps")
    return [weights_fingerprint(model), [getattr(args, flag) for flag in flags],
            os.stat(regions.features).st_mtime_ns if regions else None]


def identity(path, settings):
    """Of a picture's explanation: the settings and the file's content."""
    try:
        return fingerprint([settings, hashlib.sha256(path.read_bytes()).hexdigest()])
    except OSError:
        return ""       # reading the picture will say what is wrong


def is_explained(folder, key):
    """Whether the folder holds the explanation with this identity."""
    try:
        with np.load(folder / "explanation.npz") as arrays:
            return str(arrays["identity"]) == key
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def explain_all(args, model, vocabulary, pictures, regions, device):
    """Explains those of the pictures, [(path, folder)], that are not yet; returns {path: InputError} of broken ones.

    regions: the data set that the pictures are the first of, for models on region features; None: on pixels.
    """
    settings, broken, size = settings_of(args, model, regions), {}, checkpoint.image_size(model)
    todo = [(i, path, folder, identity(path, settings)) for i, (path, folder) in enumerate(pictures)]
    todo = [item for item in todo if args.overwrite or not is_explained(*item[2:])]
    with tqdm(total=len(pictures), initial=len(pictures) - len(todo), desc="explaining", unit="picture") as bar:
        for batch in (todo[i:i + args.batch_size] for i in range(0, len(todo), args.batch_size)):
            sound = []
            for i, path, folder, key in batch:
                try:
                    sound.append((i, path, folder, key, read_image(path)))
                except InputError as error:
                    broken[path] = error
                    bar.write(f"left out: {error}")
            results = []
            if sound:
                if regions:
                    images, boxes, counts = read_regions(regions, sound)
                else:
                    images = torch.stack([preprocess(picture, size) for *_, picture in sound])
                results = explain_batch(args, model, vocabulary, images.to(device))
                if regions:
                    results = map(only_regions_there, results, boxes, counts)
            for (_, path, folder, key, picture), arrays in zip(sound, results, strict=True):
                publish(folder, picture, arrays | {"identity": np.array(key)})
                arrived = f"   (LRP: {arrays['conservation'].mean():.0%} of the logits reached words and picture)" \
                    if "conservation" in arrays else ""
                bar.write(f"{path.name}: {sentence(arrays['words'].tolist())}{arrived}")
            bar.update(len(batch))
    return broken


def read_regions(regions, sound):
    """Features (B, K, C), boxes (B, K, 4) and counts (B,) of the pictures [(index, path, …, picture)]; InputError if
    boxes lie beyond their photograph."""
    rows = [i for i, *_ in sound]
    boxes, sides = regions.read_boxes(rows), torch.tensor([picture.shape[:0:-1] for *_, picture in sound])  # W, H
    beyond = (boxes[..., 2:] > 1.05 * sides[:, None]).any(2).any(1).nonzero().flatten().tolist()
    if beyond:
        raise InputError(f"{regions.features} has regions beyond the photograph {sound[beyond[0]][1]}: give it the "
                         "size that it had when its features were made")
    return regions.read_features(rows), boxes, regions.region_counts(rows)


def only_regions_there(arrays, boxes, count):
    """The arrays without padded regions, and so `boxes` (K, 4)."""
    return {name: part[..., :count] if name == "attention" or name.endswith("_regions") else part
            for name, part in arrays.items()} | {"boxes": boxes[:count].numpy()}


def make_page(path, pictures):
    """index.html of the explanations in the folders of [(picture's path, folder)]."""
    entries = []
    for picture, folder in tqdm(pictures, desc=path.name, unit="picture"):
        with np.load(folder / "explanation.npz") as arrays:
            entries.append(page_entry(folder.name, photograph(read_image(picture)), dict(arrays)))
    write_page(path, entries)


def main(args):
    print_settings(args)
    device = pick_device(args.device)
    set_seed(args.seed)
    if bool(args.images) == bool(args.dataset):
        raise InputError("give either --images FILE_OR_FOLDER … or --dataset NAME")
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    regions = open_regions(args, model) if model.encoder is None else None
    if args.caption is not None:
        encode_caption(args.caption, vocabulary)
    if args.contrast is not None:
        contrast_word(args.contrast, vocabulary)
    paths = (find_pictures(args.images) if args.images else split_pictures(args))[:args.max_images]
    save_path = make_folder(args.save_path)
    pictures = [(path, save_path / name) for path, name in zip(paths, folder_names(paths), strict=True)]
    broken = explain_all(args, model, vocabulary, pictures, regions, device)
    sound = [item for item in pictures if item[0] not in broken]
    if not sound:
        raise InputError("none of the pictures can be read, so there is nothing to explain: check --images")
    make_page(save_path / "index.html", sound)
    print(f"pictures and arrays: {save_path}/index.html")
    if broken and not args.skip_broken:
        raise InputError(f"{len(broken)} of {len(paths)} pictures were left out, the others are explained; the first: "
                         f"{next(iter(broken.values()))} (--skip_broken makes this no error)")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
