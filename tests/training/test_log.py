"""log.csv and curves.png of a training run."""
import csv

import pytest
from matplotlib.figure import Figure

from captioning.training.log import write_log

CIDER = {1: 0.2, 2: 0.4, 3: 0.6, 4: 0.1}
ROWS = [[epoch, 6, 10.0 / epoch, 0.1 * epoch, CIDER[epoch], 0.1, 1e-3, 1.5, 9.0 / epoch]
        for epoch in CIDER]


@pytest.fixture
def figures(monkeypatch):
    """Figures saved during the test."""
    saved, savefig = [], Figure.savefig

    def save(figure, *args, **options):
        saved.append(figure)
        savefig(figure, *args, **options)
    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def lines(figure, *axes):
    """{label: epochs} of the lines with markers in the given axes."""
    return {line.get_label(): list(line.get_xdata()) for i in axes for line in figure.axes[i].lines
            if line.get_marker() == "o"}


def test_log_has_one_row_per_epoch(tmp_path):
    write_log(tmp_path, ROWS, "reward")
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[1]["train_reward"]) == 0.2 and float(rows[1]["val_loss"]) == 4.5
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_files_with_these_rows_are_not_written_again(tmp_path, figures):
    write_log(tmp_path, ROWS)
    write_log(tmp_path, ROWS)
    assert len(figures) == 1
    (tmp_path / "curves.png").unlink()
    write_log(tmp_path, ROWS)
    assert len(figures) == 2 and (tmp_path / "curves.png").exists()
    write_log(tmp_path, ROWS[:2])
    assert len(figures) == 3 and (tmp_path / "log.csv").read_text().count("\n") == 3


def test_rows_of_earlier_versions_have_no_validation_loss(tmp_path):
    write_log(tmp_path, [ROWS[0][:-1], ROWS[1]])
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["val_loss"] for row in rows] == ["nan", "4.5"]


@pytest.mark.parametrize("region_epochs, expected", [
    (0, {"training": [1, 2, 3, 4]}), (2, {"region loss, training": [1, 2], "training": [3, 4]}),
    (4, {"region loss, training": [1, 2, 3, 4]})])
def test_phases_and_losses(tmp_path, figures, region_epochs, expected):
    write_log(tmp_path, ROWS, region_epochs=region_epochs)
    assert lines(figures[0], 0) == expected | {"validation": [1, 2, 3, 4]}
    assert lines(figures[0], 1) == {"CIDEr": [1, 2, 3, 4], "BLEU-4": [1, 2, 3, 4]}
    legends = [axes.get_legend().get_texts() for axes in figures[0].axes]
    texts = [[text.get_text() for text in legend] for legend in legends]
    assert all(("phase of the region loss" in legend) == (region_epochs > 0) for legend in texts)
    assert "best: epoch 3" in texts[1]


def test_the_loss_of_self_critical_training_has_its_own_axis(tmp_path, figures):
    write_log(tmp_path, ROWS, "reward")
    assert len(figures[0].axes) == 3 and lines(figures[0], 0) == {"validation": [1, 2, 3, 4]}
    assert lines(figures[0], 2) == {"self-critical loss, training": [1, 2, 3, 4]}
    legend = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert set(legend) == {"validation", "self-critical loss, training"}
