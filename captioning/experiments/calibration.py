"""Fits the threshold of captioning.grounding to the captions of a validation split."""
from pathlib import Path

from captioning import grounding, processes
from captioning.experiments.runner import read_rows, run_experiments


def calibrate(weight, study, data, captions, batch_size, workers, device, folder):
    """Stores the Calibration of the checkpoint `weight` beside it.

    study, data, captions, batch_size, workers, device, folder: as in `run_experiments`, of the
    validation split; the table of the experiment grounding for it is written to `folder`."""
    run_experiments(study, data, captions, ["grounding"], None, batch_size, workers, device,
                    folder, ["val"])
    if processes.rank() == 0:
        rows = read_rows(Path(folder, "grounding_words_val.csv"))
        present = rows["value"][rows["measure"] == "present"].tolist()
        shares = rows["value"][rows["measure"] == "absolute_share"].tolist()
        threshold = grounding.fit_threshold(shares, present, kept=0.95)
        ban_threshold = grounding.fit_threshold(shares, present, kept=0.98)
        grounding.save(weight, study.model, threshold, ban_threshold, study.objects,
                       words_correct=int(sum(present)),
                       words_absent=int(len(present) - sum(present)))
        path = grounding.calibration_path(weight)
        print(f"threshold of the image's share: {threshold:.4g} ({path})")
    processes.wait()
