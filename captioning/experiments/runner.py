"""Scores of explanations: the loop over pictures, its part files, tables and plots.

The unit of work is a batch of pictures. Its rows go into part files, one for each experiment, that appear whole; what
is there already is not measured again, by whichever process. Batches are the same with any number of processes, and so
is every digit.
"""
import csv
import io
import math
from array import array
from pathlib import Path

import torch
from tqdm import tqdm

from captioning import processes
from captioning.data.feature_store import weights_fingerprint
from captioning.data.loader import make_loader
from captioning.errors import InputError
from captioning.experiments.batch import METHODS, Batch
from captioning.experiments.registry import EXPERIMENTS, NEED_PIXELS
from captioning.files import atomic_path, fingerprint, make_folder, write_text

COLUMNS = ("image", "step", "word", "method", "measure", "value")
TABLE = ("method", "measure", "mean", "standard_error", "count")


def run_experiments(study, pictures, captions, names, limit, batch_size, workers, device, folder, flags):
    """Runs the experiments `names` on pictures, a CaptionDataset with images, and their captions: on the first `limit`
    pictures, or all, of which any experiment has a word to measure. Writes <experiment>_words_<split>.csv,
    <experiment>_<split>.csv and .png in `folder`; flags: the split, and what else the captions of changed pictures
    depend on. Returns {experiment: table} in the first process, else None."""
    split = flags[0]
    chosen = [i for i, caption in enumerate(captions) if has_words(study, pictures, i, caption, names)][:limit]
    identity = fingerprint([weights_fingerprint(study.model), [(pictures.names[i], captions[i]) for i in chosen],
                            study.methods, study.seed, batch_size, sorted(study.objects.words.items()), study.boxes,
                            sorted(study.frequent), flags])
    parts = make_folder(Path(folder) / f"parts_{identity}")
    batches = [chosen[i:i + batch_size] for i in range(0, len(chosen), batch_size)]
    paths = {name: [parts / f"{name}_{batch[0]:06d}.csv" for batch in batches] for name in names}
    measure_all(study, pictures, captions, names, batches, paths, workers, device)
    processes.wait()
    if processes.rank():
        return None
    return {name: conclude(name, paths[name], Path(folder), split) for name in names}


def has_words(study, pictures, i, caption, names):
    """Whether any of the experiments `names` has a word of picture i to measure."""
    batch = Batch(study, [i], [pictures.names[i]], torch.empty(1, 3, 1, 1), [caption.split()], [pictures.references[i]])
    return any(choose(batch).any() for name in names for choose, _ in EXPERIMENTS[name].parts)


def measure_all(study, pictures, captions, names, batches, paths, workers, device):
    """Writes the part files {experiment: [path of each batch]} that are missing."""
    mine = processes.own(list(range(len(batches))))
    todo = [k for k in mine if not all(paths[name][k].exists() for name in names)]
    loader = make_loader(pictures, [batches[k] for k in todo], workers, device) if todo else []
    with tqdm(total=sum(len(batches[k]) for k in mine), initial=sum(len(batches[k]) for k in set(mine) - set(todo)),
              desc="explanations", unit="image", disable=processes.rank() > 0) as bar:
        for k, content in zip(todo, loader, strict=True):
            indices = batches[k]
            batch = Batch(study, indices, [pictures.names[i] for i in indices], content["images"].to(device),
                          [captions[i].split() for i in indices], [pictures.references[i] for i in indices])
            for name in names:
                if not paths[name][k].exists():
                    write_text(paths[name][k], as_csv(measure(EXPERIMENTS[name], batch)))
            bar.update(len(indices))


def measure(experiment, batch):
    """Rows (image, step, word, method, measure, value) of a batch, word by word."""
    lines = []
    with torch.no_grad():
        for choose, function in experiment.parts:
            rows, steps = choose(batch).nonzero(as_tuple=True)
            if not len(rows) or (batch.on_regions and function in NEED_PIXELS):
                continue
            found = function(batch, rows, steps)
            values = torch.stack([part.cpu().double() for part in found.values()], 1).tolist()     # (n, measures)
            for b, t, own in zip(rows.tolist(), steps.tolist(), values, strict=True):
                word = batch.names[b], t, batch.words[b][t]
                lines += [(*word, *key, f"{value:.9g}") for key, value in zip(found, own, strict=True)
                          if not math.isnan(value)]
    return lines


def as_csv(lines):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def conclude(name, parts, folder, split):
    """Joins the part files, writes table and plot, prints the table; returns {(method, measure): Score}."""
    values = {}
    with atomic_path(folder / f"{name}_words_{split}.csv") as temporary, open(temporary, "w", newline="",
                                                                             encoding="utf-8") as file:
        file.write(as_csv([COLUMNS]))
        for part in parts:
            text = part.read_text(encoding="utf-8")
            file.write(text)
            try:
                for *_, method, measured, value in csv.reader(io.StringIO(text)):
                    values.setdefault((method, measured), array("d")).append(float(value))
            except ValueError as error:
                raise InputError(f"{part} is damaged ({error}): remove it and run the same command again") from error
    if not values:
        print(f"{name}: no caption has a word that it could measure")
        return {}
    experiment = EXPERIMENTS[name]
    values = dict(sorted(values.items(), key=lambda item: place(item[0][0])))
    table = experiment.table(values)
    lines = [(method, measured, f"{mean:.6g}", f"{error:.6g}", count)
             for (method, measured), (mean, error, count) in table.items()]
    write_text(folder / f"{name}_{split}.csv", as_csv([TABLE, *lines]))
    experiment.draw(folder / f"{name}_{split}.png", table, values)
    show(name, table, experiment.shown or sorted({measured for _, measured in table})[::4])
    return table


def place(method):
    """Methods come as in METHODS, baselines of an experiment's own after them."""
    return METHODS.index(method) if method in METHODS else len(METHODS)


def show(name, table, measures):
    """Prints a line for each method, a column for each of the measures."""
    print(f"\n{name:18}" + "".join(f"{measured:>18}" for measured in measures))
    for method in dict.fromkeys(method for method, _ in table):
        cells = [f"{table[key].mean:.3f} ± {table[key].error:.3f}" if (key := (method, measured)) in table else ""
                 for measured in measures]
        print(f"{method:18}" + "".join(f"{cell:>18}" for cell in cells))
    counts = [max((found.count for (_, name), found in table.items() if name == measured), default="")
              for measured in measures]
    print(f"{'words':18}" + "".join(f"{count:>18}" for count in counts), flush=True)
