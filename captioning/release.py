"""Makes a small file of a trained model, to be published:
python -m captioning.release CHECKPOINT OUTPUT"""
import io
import zipfile
from pathlib import Path

import torch

from captioning import checkpoint
from captioning.cli import Parser
from captioning.errors import run_script
from captioning.files import atomic_path


def release(source, path):
    """Writes the checkpoint `source` to `path` with weights in float16, compressed, and without
    its training state; it is read like any other checkpoint."""
    content = checkpoint.read(source)
    for name, value in content["state_dict"].items():
        if value.is_floating_point():
            content["state_dict"][name] = value.half()
    # evaluation.py reads whether the model was trained on stored features
    from_features = (content.get("training") or {}).get("from_features", False)
    content["training"] = {"from_features": from_features}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with (atomic_path(path) as temporary, zipfile.ZipFile(buffer) as stored,
          zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as compressed):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))


def main(args):
    release(args.checkpoint, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = Parser(" ".join(__doc__.split()))
    parser.add_argument("checkpoint", type=Path, help="checkpoint of train.py or finetune.py")
    parser.add_argument("output", type=Path, help="file to write")
    run_script(main, parser.parse_args())
