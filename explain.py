"""Captions pictures, shows why each word was said: python explain.py --weight output/checkpoint_best.pth --images ."""
import os
import shutil
from collections import Counter
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

from captioning import checkpoint, decoding
from captioning.cli import (
    Parser,
    add_device,
    add_seed,
    non_negative,
    pick_device,
    positive_int,
    print_settings,
    set_seed,
)
from captioning.correctness import explained, pixel_maps
from captioning.errors import InputError, run_script
from captioning.files import make_folder, write_text
from captioning.images import preprocess, read_image
from captioning.plots import SEQUENTIAL, draw_heatmaps, draw_words
from captioning.vocabulary import tokenise

METHODS = ("lrp", "gradient", "grad_cam", "guided_backprop", "guided_grad_cam", "attention")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def get_args_parser():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--weight", required=True, help="checkpoint of a captioning model")
    add("--images", nargs="+", required=True, metavar="FILE_OR_FOLDER", help="pictures to caption and explain")
    add("--methods", nargs="+", choices=METHODS, default=["lrp", "attention"], help="ways to explain")
    add("--caption", help="explain this sentence instead of the model's own")
    add("--decoding", choices=["greedy", "beam_search", "diverse_beam_search"], default="beam_search",
        help="how the model's own is found")
    add("--beam_size", type=positive_int, default=3, help="hypotheses a picture")
    add("--max_len", type=positive_int, default=50, help="words at most")
    add("--wordmap", metavar="FILE", help="word map of a published checkpoint")
    add("--eps", type=non_negative, default=0.01, help="of LRP's ε-rule")
    add("--batch_size", type=positive_int, default=8, help="pictures explained at once")
    add("--chunk", type=positive_int, help="words at once through the encoder, to bound memory")
    add("--skip_broken", action="store_true", help="go on without pictures that cannot be read")
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


def read_pictures(paths, skip_broken):
    """[(path, uint8 picture)], without the broken ones if they may be skipped."""
    pictures = []
    for path in paths:
        try:
            pictures.append((path, read_image(path)))
        except InputError as error:
            if not skip_broken:
                raise
            print(f"left out: {error}")
    return pictures


def encode_caption(text, vocabulary):
    """ids (L,) from <start> to <end>; InputError that names words outside the vocabulary."""
    words = tokenise(text)
    unknown = [word for word in words if word not in vocabulary.wordmap]
    if unknown or not words:
        raise InputError(f"--caption {text!r} has words outside the model's vocabulary: {', '.join(unknown)}" if unknown
                         else "--caption holds no words")
    return torch.tensor(vocabulary.encode(words, len(words)))


def captions_of(args, model, vocabulary, images):
    """(B, T+1) ids from <start> on: the user's sentence, or the model's own."""
    if args.caption is not None:
        return encode_caption(args.caption, vocabulary).to(images.device).expand(len(images), -1)
    with torch.no_grad():
        tokens = decoding.decode(model, model.encode(images), vocabulary, args.decoding, args.max_len, args.beam_size)
    return torch.cat([tokens.new_full((len(tokens), 1), vocabulary.start), tokens], dim=1)


def explain_batch(args, model, vocabulary, pictures, size, device):
    """For each picture {"words": said with <end>, "read", and per method "maps" (T, S, S) and "word_relevance"}."""
    images = torch.stack([preprocess(picture, size) for _, picture in pictures]).to(device)
    captions = captions_of(args, model, vocabulary, images)
    lengths = (captions[:, 1:] != 0).sum(1).tolist()
    results = [{"ids": row[:length + 1], "methods": {}} for row, length in zip(captions.tolist(), lengths, strict=True)]
    for method in args.methods:
        options = {"chunk": args.chunk} if method not in ("attention", "grad_cam") else {}
        found = explained(model, images, captions, method, **options | ({"eps": args.eps} if method == "lrp" else {}))
        maps = pixel_maps(found, method, (size, size)).cpu().numpy()
        regions, words, attention, targets = (
            part.cpu().numpy() for part in (found.features.sum(-1), found.words, found.attention, found.targets))
        for b, T in enumerate(lengths):
            results[b] |= {"attention": attention[b, :T], "targets": targets[b, :T]}
            results[b]["methods"][method] = {"pixels": maps[b, :T], "regions": regions[b, :T],
                                             "words": words[b, :T, :T]}
            if method == "lrp":
                results[b]["conservation"] = found.conservation[b, :T].mean().item()
    return results


def publish(folder, picture, result, vocabulary):
    """Writes the picture's folder; it appears whole. In one that is there already, a former explanation is replaced."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        write(make_folder(temporary), picture, result, vocabulary)
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


def write(folder, picture, result, vocabulary):
    """One PNG a method, words_<method>.png and explanation.npz."""
    words = [vocabulary.words[i] for i in result["ids"]]
    sentence, photograph = " ".join(vocabulary.decode(result["ids"])), picture.permute(1, 2, 0).numpy()
    arrays = {"words": np.array(words), "attention": result["attention"], "logits": result["targets"]}
    for method, found in result["methods"].items():
        title = f"{sentence}   [{method}]"
        draw_heatmaps(folder / f"{method}.png", photograph, words[1:], found["pixels"], title,
                      signed=method not in SEQUENTIAL)
        arrays[f"{method}_pixels"] = found["pixels"].astype(np.float32)
        if method != "attention":
            draw_words(folder / f"words_{method}.png", words[:-1], words[1:], found["words"], title)
            arrays |= {f"{method}_words": found["words"], f"{method}_regions": found["regions"]}
    np.savez_compressed(folder / "explanation.npz", **arrays)


def write_index(save_path, sentences, methods):
    """index.html: for every folder in `sentences`, {folder's name: sentence}, its pictures, by relative links."""
    parts = []
    for name, sentence in sentences.items():
        pngs = [f"{prefix}{method}.png" for method in methods for prefix in ("", "words_")
                if prefix == "" or method != "attention"]
        pictures = "".join(f'<a href="{quote(f"{name}/{png}")}"><img loading="lazy" alt="{escape(png)}" '
                           f'src="{quote(f"{name}/{png}")}"></a>\n' for png in pngs)
        parts.append(f"<h2>{escape(sentence) or '(no words)'}</h2>\n<p>{escape(name)}</p>\n{pictures}")
    write_text(Path(save_path) / "index.html", f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Explanations</title>
<style>body {{ font-family: sans-serif; margin: 2em }} img {{ max-width: 100%; max-height: 40em }}</style>
{"".join(parts)}</html>
""")


def main(args):
    print_settings(args)
    device = pick_device(args.device)
    set_seed(args.seed)
    model, vocabulary = checkpoint.load(args.weight, device, args.wordmap)
    size = checkpoint.image_size(model)
    if size is None:
        raise InputError(f"{args.weight} works on region features, not on pictures: explain a model with a CNN encoder")
    paths = find_pictures(args.images)
    if args.caption is not None:
        encode_caption(args.caption, vocabulary)
    save_path = make_folder(args.save_path)
    folders = dict(zip(paths, folder_names(paths), strict=True))
    batches = [paths[i:i + args.batch_size] for i in range(0, len(paths), args.batch_size)]
    sentences = {}
    with tqdm(total=len(paths), desc="explaining", unit="picture") as bar:
        for batch in batches:
            pictures = read_pictures(batch, args.skip_broken)
            results = explain_batch(args, model, vocabulary, pictures, size, device) if pictures else []
            for (path, picture), result in zip(pictures, results, strict=True):
                publish(save_path / folders[path], picture, result, vocabulary)
                sentences[folders[path]] = " ".join(vocabulary.decode(result["ids"]))
                shares = f"   (LRP: {result['conservation']:.0%} of the logits reached words and picture)" \
                    if "conservation" in result else ""
                bar.write(f"{path.name}: {sentences[folders[path]]}{shares}")
            bar.update(len(batch))
    if not sentences:
        raise InputError("none of the pictures can be read, so there is nothing to explain: check --images")
    write_index(save_path, sentences, args.methods)
    print(f"pictures and arrays: {save_path}/index.html")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
