"""The experiments by name. An experiment that is registered here is offered by evaluation.py."""
from captioning.experiments.ablation import ABLATION
from captioning.experiments.correctness import CORRECTNESS
from captioning.experiments.deletion_insertion import DELETION_INSERTION
from captioning.experiments.mask_mass import MASK_MASS
from captioning.experiments.pointing_game import POINTING_GAME
from captioning.experiments.presence import PRESENCE
from captioning.experiments.sanity import SANITY
from captioning.experiments.tpfp import TPFP
from captioning.explanation.methods import report_omitted

EXPERIMENTS = {
    "ablation": ABLATION,
    "correctness": CORRECTNESS,
    "tpfp": TPFP,
    "deletion_insertion": DELETION_INSERTION,
    "pointing_game": POINTING_GAME,
    "mask_mass": MASK_MASS,
    "grounding": PRESENCE,
    "sanity": SANITY,
}


def experiments_for_regions(names, weight):
    """Those of the experiments that region features permit; names the omitted ones in one sentence.

    weight: path of the checkpoint, for the message."""
    parts = [(name, part) for name in names for part in EXPERIMENTS[name].parts]
    omitted = [part.measure.__name__ for _, part in parts if part.needs_pixels]
    if omitted:
        report_omitted(omitted, weight)
    applicable = {name for name, part in parts if not part.needs_pixels}
    return [name for name in names if name in applicable]


def metrics_of(tables):
    """The entries {key: number} of metrics_<split>.json, from {experiment: table}."""
    metrics = {}
    if len(table := tables.get("correctness", ())):
        for (method, measure), row in table.iterrows():
            if measure == "0.0" and method != "box":
                metrics[f"inside_box_{method}"] = row["mean"]
        box = table.loc[("box", "0.0")]
        metrics |= {"box_share": box["mean"], "explained_words": int(box["count"])}

    keys = {("absolute_share", "all objects"): "grounding_auc",
            ("flagged", "precision"): "flag_precision",
            ("flagged", "recall"): "flag_recall"}
    if len(table := tables.get("grounding", ())):
        means = table["mean"].dropna()
        metrics |= {name: means[key] for key, name in keys.items() if key in means}
    return metrics
