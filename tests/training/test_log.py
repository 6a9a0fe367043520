"""log.csv and curves.png of a training run."""
import csv

import pytest
from matplotlib.figure import Figure

from captioning.training.log import write_log

ROWS = [[epoch, 6, 10.0 / epoch, 0.1 * epoch, 0.2 * epoch, 0.1, 1e-3, 1.5] for epoch in (1, 2, 3, 4)]


@pytest.fixture
def figures(monkeypatch):
    """Figures saved during the test."""
    saved, savefig = [], Figure.savefig

    def save(figure, *args, **options):
        saved.append(figure)
        savefig(figure, *args, **options)
    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_log_has_one_row_per_epoch(tmp_path):
    write_log(tmp_path, ROWS, "reward")
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"] and float(rows[1]["train_reward"]) == 0.2
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("region_epochs, expected", [
    (0, {"caption loss": [1, 2, 3, 4]}), (2, {"region loss": [1, 2], "caption loss": [3, 4]}),
    (4, {"region loss": [1, 2, 3, 4]})])
def test_region_loss_and_caption_loss_are_separate_lines(tmp_path, figures, region_epochs, expected):
    write_log(tmp_path, ROWS, region_epochs=region_epochs)
    left = figures[0].axes[0]
    assert {line.get_label(): list(line.get_xdata()) for line in left.lines} == expected
    assert (left.get_legend() is not None) == (region_epochs > 0)
