"""The loop over a split that runs the experiments: part files, tables and plots.

The unit of work is a batch of images. For each experiment its rows are written to a part file, completely or not at
all, and existing part files are not computed again, so that an interrupted run resumes. The batches do not depend on
the number of processes, so that results are reproducible to the last digit.
"""
import csv
import io
import math
import shutil
from array import array
from pathlib import Path

import torch
from tqdm import tqdm

from captioning import processes
from captioning.data.feature_store import weights_fingerprint
from captioning.data.loader import make_loader
from captioning.errors import InputError
from captioning.experiments.batch import Batch
from captioning.experiments.registry import EXPERIMENTS, NEED_PIXELS
from captioning.explanation.methods import METHODS
from captioning.files import atomic_path, fingerprint, make_folder, remove_leftovers, write_text
from captioning.metrics.score_table import align

COLUMNS = ("image", "step", "word", "method", "measure", "value")
TABLE = ("method", "measure", "mean", "standard_error", "count")


def run_experiments(study, data, captions, names, limit, batch_size, workers, device, folder, flags):
    """Runs the experiments `names` on the captions of a split.

    data: CaptionDataset of images or region features; captions: one text per image; limit: the number of images, the
    first of those with a word that any experiment can measure (None: all); workers: processes that read images; flags:
    the split's name, and all other settings on which captions of modified images depend.

    Writes <experiment>_words_<split>.csv, <experiment>_<split>.csv and .png in `folder`. Returns {experiment: table}
    in the first process and None in the others. Meanwhile <folder>/parts_<hash>/ contains the part files; it is removed
    when all tables and plots are written.
    """
    split = flags[0]
    selected = [i for i, caption in enumerate(captions) if has_words(study, data, i, caption, names)][:limit]
    identity = fingerprint([weights_fingerprint(study.model), [(data.names[i], captions[i]) for i in selected],
                            study.methods, study.seed, batch_size, sorted(study.objects.words.items()), study.boxes,
                            sorted(study.frequent), flags])
    parts = make_folder(Path(folder) / f"parts_{identity}")
    remove_leftovers(parts)
    batches = [selected[i:i + batch_size] for i in range(0, len(selected), batch_size)]
    paths = {name: [parts / f"{name}_{batch[0]:06d}.csv" for batch in batches] for name in names}
    measure_all(study, data, captions, names, batches, paths, workers, device)
    processes.wait()
    if processes.rank():
        return None
    tables = {name: conclude(name, paths[name], Path(folder), split) for name in names}
    shutil.rmtree(parts, ignore_errors=True)
    return tables


def has_words(study, data, i, caption, names):
    """Whether the caption of image i has a word that any of the experiments `names` measures."""
    batch = Batch(study, [i], [data.names[i]], torch.empty(1, 3, 1, 1), [caption.split()], [data.references[i]])
    return any(select(batch).any() for name in names for select, _ in EXPERIMENTS[name].parts)


def measure_all(study, data, captions, names, batches, paths, workers, device):
    """Writes this process's share of the missing part files; paths: {experiment: path of each batch}."""
    share = range(processes.rank(), len(batches), processes.count())
    missing = [k for k in share if not all(paths[name][k].exists() for name in names)]
    loader = make_loader(data, [batches[k] for k in missing], workers, device) if missing else []
    with tqdm(total=sum(len(batches[k]) for k in share),
              initial=sum(len(batches[k]) for k in set(share) - set(missing)),
              desc="measuring explanations", unit="image", disable=processes.rank() > 0) as bar:
        for k, content in zip(missing, loader, strict=True):
            indices = batches[k]
            batch = Batch(study, indices, [data.names[i] for i in indices], content["images"].to(device),
                          [captions[i].split() for i in indices], [data.references[i] for i in indices])
            for name in names:
                if not paths[name][k].exists():
                    write_text(paths[name][k], as_csv(measure(EXPERIMENTS[name], batch)))
            bar.update(len(indices))


def measure(experiment, batch):
    """Rows (image, step, word, method, measure, value) of one experiment on one batch, word by word."""
    lines = []
    with torch.no_grad():
        for select, function in experiment.parts:
            rows, steps = select(batch).nonzero(as_tuple=True)
            if not len(rows) or (batch.on_regions and function in NEED_PIXELS):
                continue
            values = function(batch, rows, steps)
            if not values:      # no method applies: attention assigns nothing to words
                continue
            by_word = torch.stack([numbers.cpu().double() for numbers in values.values()], 1).tolist()
            for b, t, numbers in zip(rows.tolist(), steps.tolist(), by_word, strict=True):
                word = batch.names[b], t, batch.words[b][t]
                lines += [(*word, *key, f"{value:.9g}") for key, value in zip(values, numbers, strict=True)
                          if not math.isnan(value)]
    return lines


def as_csv(lines):
    """The lines, lists of values, as CSV text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def conclude(name, parts, folder, split):
    """Joins the part files of an experiment, writes its table and plot, prints the table and returns it."""
    values = {}
    with atomic_path(folder / f"{name}_words_{split}.csv") as temporary, open(temporary, "w", newline="",
                                                                             encoding="utf-8") as file:
        file.write(as_csv([COLUMNS]))
        for part in parts:
            text = part.read_text(encoding="utf-8")
            file.write(text)
            try:
                for *_, method, measure_name, value in csv.reader(io.StringIO(text)):
                    values.setdefault((method, measure_name), array("d")).append(float(value))
            except ValueError as error:
                raise InputError(f"{part} is damaged ({error}): remove it and run the same command again") from error
    if not values:
        print(f"{name}: the captions have no word that it measures with the given --methods, so there is no table")
        return {}
    experiment = EXPERIMENTS[name]
    values = dict(sorted(values.items(), key=lambda item: method_order(item[0][0])))
    table = experiment.table(values)
    lines = [(method, measure_name, f"{mean:.6g}", f"{error:.6g}", count)
             for (method, measure_name), (mean, error, count) in table.items()]
    write_text(folder / f"{name}_{split}.csv", as_csv([TABLE, *lines]))
    experiment.draw(folder / f"{name}_{split}.png", table, values)
    show(name, table, experiment.shown or sorted({measure_name for _, measure_name in table})[::4])
    return table


def read_values(path):
    """The values {(method, measure): numbers} of an <experiment>_words_<split>.csv."""
    values = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            values.setdefault((row["method"], row["measure"]), []).append(float(row["value"]))
    return values


def method_order(method):
    """Sorting key: the order of METHODS, then the experiments' own baselines."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def show(name, table, measures):
    """Prints a row for each method and a column for each of the measures."""
    rows = [[name, *measures]]
    for method in dict.fromkeys(method for method, _ in table):
        rows.append([method] + [f"{table[key].mean:.3f} ± {table[key].error:.3f}" if (key := (method, measure)) in table
                                else "" for measure in measures])
    rows.append(["words"] + [str(max((score.count for (_, other), score in table.items() if other == measure),
                                     default="")) for measure in measures])
    print(f"\n{align(rows)}", flush=True)
