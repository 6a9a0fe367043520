"""The loop over a split that runs the experiments and writes their tables and plots.

The rows of each experiment and batch of images are written to a file of their own, and existing
files are not computed again, so that an interrupted run resumes. The batches do not depend on the
number of processes, so that results are reproducible to the last digit."""
import math
import shutil
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from captioning import processes
from captioning.data.feature_store import weights_fingerprint
from captioning.data.loader import make_loader
from captioning.experiments.batch import Batch
from captioning.experiments.experiment import KEY
from captioning.experiments.registry import EXPERIMENTS
from captioning.explanation.methods import METHODS
from captioning.files import fingerprint, make_folder, reading, remove_leftovers, write_text

WORD = ["image", "step", "word"]
COLUMNS = [*WORD, *KEY, "value"]


def run_experiments(study, data, captions, names, limit, batch_size, workers, device, folder,
                    flags):
    """Runs the experiments `names` on the captions of a split, one text per image.

    limit: the number of images, the first of those with a word that any experiment can measure
    (None: all); flags: the split's name, and all other settings on which captions of modified
    images depend.

    Writes <experiment>_words_<split>.csv, <experiment>_<split>.csv and .png in `folder`, and
    meanwhile the rows of each batch in <folder>/parts_<hash>/. Returns {experiment: table} in the
    first process and {} in the others."""
    def make_batch(indices, images):
        return Batch(study, indices, [data.names[i] for i in indices], images,
                     [captions[i].split() for i in indices], [data.references[i] for i in indices])

    def has_words(i):
        batch = make_batch([i], torch.empty(1, 3, 1, 1))
        parts = [part for name in names for part in EXPERIMENTS[name].parts]
        return any(part.words(batch).any() for part in parts)

    selected = [i for i in range(len(captions)) if has_words(i)][:limit]
    identity = fingerprint([
        weights_fingerprint(study.model),
        [(data.names[i], captions[i], data.references[i], data.content_hash(i)) for i in selected],
        study.methods, study.seed, batch_size, sorted(study.objects.words.items()), study.boxes,
        sorted(study.frequent), sorted(study.stop_words), study.objects.exact,
        study.calibration and study.calibration._replace(objects=None),
        study.masks and study.masks.content_hash, flags])
    parts = make_folder(Path(folder) / f"parts_{identity}")
    remove_leftovers(parts)
    batches = [selected[i:i + batch_size] for i in range(0, len(selected), batch_size)]
    paths = {name: [parts / f"{name}_{batch[0]:06d}.csv" for batch in batches] for name in names}

    # each process computes what is missing of its share of the batches
    share = processes.shard(list(range(len(batches))))
    missing = [k for k in share if not all(paths[name][k].exists() for name in names)]
    loader = make_loader(data, [batches[k] for k in missing], workers, device) if missing else []
    with tqdm(total=len(share), initial=len(share) - len(missing), desc="measuring explanations",
              unit="batch", disable=processes.rank() > 0) as bar:
        for k, content in zip(missing, loader, strict=True):
            batch = make_batch(batches[k], content["images"].to(device))
            for name in names:
                if not paths[name][k].exists():
                    rows = measure(EXPERIMENTS[name], batch)
                    write_text(paths[name][k], as_csv(rows, "%.9g", header=False))
            bar.update()

    processes.wait()
    if processes.rank():
        return {}
    tables = {name: conclude(name, paths[name], Path(folder), flags[0]) for name in names}
    shutil.rmtree(parts, ignore_errors=True)
    return tables


def measure(experiment, batch):
    """The rows (COLUMNS) of one experiment on one batch, word by word, without values of NaN."""
    rows = []
    for part in experiment.parts:
        words = part.words(batch)
        if not words.any() or (batch.on_regions and part.needs_pixels):
            continue
        images, steps = words.nonzero(as_tuple=True)
        with torch.no_grad():
            values = part.measure(batch, images, steps)
        values = {key: numbers.tolist() for key, numbers in values.items()}
        for i, (b, t) in enumerate(zip(images.tolist(), steps.tolist(), strict=True)):
            word = batch.names[b], t, batch.words[b][t]
            rows += [(*word, *key, numbers[i]) for key, numbers in values.items()
                     if not math.isnan(numbers[i])]
    return pd.DataFrame(rows, columns=COLUMNS)


def as_csv(table, float_format, **options):
    """The text of a table."""
    return table.to_csv(index=False, float_format=float_format, lineterminator="\n", na_rep="nan",
                        **options)


def read_rows(path, **options):
    """The rows (COLUMNS) of a file that an experiment wrote."""
    with reading(path, "remove it and run the same command again"):
        rows = pd.read_csv(path, dtype=dict.fromkeys(("image", "word", *KEY), str),
                           keep_default_na=False, **options)
        return rows.astype({"value": float})


def conclude(name, parts, folder, split):
    """Joins the rows of an experiment, writes its table and plot, prints and returns the table."""
    experiment = EXPERIMENTS[name]
    values = pd.concat([read_rows(part, names=COLUMNS) for part in parts if part.stat().st_size]
                       or [pd.DataFrame(columns=COLUMNS)])
    write_text(folder / f"{name}_words_{split}.csv", as_csv(values, "%.9g"))
    if values.empty:
        print(f"{name}: the captions have no word that it measures with the given --methods, so "
              "there is no table")
        return {}

    # in the order of METHODS, then the experiment's own baselines
    order = {method: number for number, method in enumerate(METHODS)}
    values = values.sort_values("method", kind="stable",
                                key=lambda methods: methods.map(order).fillna(len(order)))
    table = experiment.table(values)
    write_text(folder / f"{name}_{split}.csv", as_csv(table.reset_index(), "%.6g"))
    experiment.draw(folder / f"{name}_{split}.png", table, values)

    measures = list(table.index.unique("measure"))
    shown = [measure for measure in experiment.shown or measures[::4] if measure in measures]
    text = table.map("{:.3f}".format)
    text = (text["mean"] + " ± " + text["standard_error"]).unstack(fill_value="")[shown]
    text = text.reindex(table.index.unique("method"))
    text.loc["words"] = table["count"].groupby("measure").max().astype(str)
    print(f"\n{name}\n{text.rename_axis(None).rename_axis(None, axis=1).to_string()}", flush=True)
    return table
