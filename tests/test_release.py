"""The small file of a trained model."""
import torch

from captioning import checkpoint
from captioning.data.vocabulary import Vocabulary
from captioning.release import release
from gridTDmodel import GridTDModel


def test_released_model(tmp_path):
    """Same captions from weights rounded to float16, in less than half of the space, without
    training state."""
    vocabulary = Vocabulary({word: i for i, word in enumerate(["<pad>", "a", "dog", "<unk>",
                                                               "<start>", "<end>"])})
    model = GridTDModel(len(vocabulary), 32, 32, 16, encoder="small").eval()
    checkpoint.save(tmp_path / "c.pth", model, vocabulary,
                    {"state": {"epoch": 3}, "from_features": True})
    release(tmp_path / "c.pth", tmp_path / "r.pth")
    assert (tmp_path / "r.pth").stat().st_size < 0.5 * (tmp_path / "c.pth").stat().st_size
    released, words = checkpoint.load(tmp_path / "r.pth")
    assert words.wordmap == vocabulary.wordmap and released.config == model.config
    assert checkpoint.read(tmp_path / "r.pth")["training"] == {"from_features": True}
    for (name, value), other in zip(model.state_dict().items(), released.state_dict().values(),
                                    strict=True):
        assert other.dtype == value.dtype
        assert torch.equal(other, value.half().float() if value.is_floating_point()
                           else value), name
