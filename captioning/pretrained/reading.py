"""Reads captioners of `transformers` from folders and from its hub, without running their code."""
import inspect
import json
from pathlib import Path

import numpy as np
import torch

from captioning.errors import InputError
from captioning.files import check_memory, shortened
from captioning.pretrained.captioner import PretrainedCaptioner
from captioning.pretrained.passes import TYPED, image_encoder
from captioning.pretrained.words import Words
from captioning.weights import check_finite

OLDEST = 4, 56      # version of transformers
DESCRIBE = "Describe the image in one sentence."
READ = {"input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"}
PROMPTS = {"paligemma": "caption en", "blip-2": ""}     # of models that need another one


def load(name, device="cpu", prompt=None):
    """(PretrainedCaptioner, Words) of a folder that `save_pretrained` wrote, or a name on its hub.

    Code that comes with a model is never run, and weights of any type are used in float32. prompt:
    a text that precedes the captions. InputError for whatever is no captioner."""
    try:
        import transformers
        if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
            raise ImportError(f"version {transformers.__version__} is installed")
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CAPTIONERS,
        )
    except ImportError as error:
        raise InputError(f"{name} is not a file, and a folder or a name on the hub requires "
                         "transformers {}.{} or newer ({}): pip install --upgrade transformers"
                         .format(*OLDEST, error)) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type not in CAPTIONERS:
            raise InputError(f"{name} is a model of the type {config.model_type}, which does not "
                             "caption images: give a captioner")
        check_size(name, config, device)
        return read_parts(transformers, name, device, prompt)
    except InputError:
        raise
    except Exception as error:      # of any kind: the library parses arbitrary files
        other = "" if prompt is None else ", or another --prompt"
        raise InputError(f"{name} cannot be loaded as a captioner of transformers "
                         f"({shortened(error) or type(error).__name__}): give a folder in which "
                         f"save_pretrained wrote model, image processor and tokenizer{other}"
                         ) from error


def read_parts(transformers, name, device, prompt):
    """What `load` returns, from the model, its tokenizer and its image processor."""
    options = {"trust_remote_code": False}
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{name} lacks weights of its model, {missing[0]} first: it was saved by "
                         "another version of transformers, or is incomplete")
    if unused := sorted(report["unexpected_keys"]):
        print(f"{name} has {len(unused)} weights that its config.json has no place for, "
              f"{unused[0]} first: its captions may be wrong")
    config = model.config
    has_decoder = hasattr(model, "decoder") or not config.is_encoder_decoder
    if image_encoder(model) is None or not has_decoder:
        raise InputError(f"{name} has no image encoder and decoder of the kinds that can be "
                         "explained: give another captioner")
    check_finite(model.state_dict(), name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    processor = transformers.AutoImageProcessor.from_pretrained(name, **options)
    settings = description(model, tokenizer, processor)
    for cuts in ("do_image_splitting", "do_pan_and_scan", "crop_to_patches"):
        if hasattr(processor, cuts):
            setattr(processor, cuts, False)

    # the tokens before a caption, and those that end it
    text = getattr(config, "text_config", config)
    starts = [getattr(config, "decoder_start_token_id", None), tokenizer.cls_token_id,
              getattr(text, "bos_token_id", None)]
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if config.model_type == "blip":
        starts = [text.bos_token_id]
        ends = text.sep_token_id
    if getattr(config, "image_token_id", None) is not None:
        whole = transformers.AutoProcessor.from_pretrained(name, **options)
        whole.image_processor = processor
        ids = prompt_of_images(whole, model, prompt)
    else:
        start = next(start for start in starts if start is not None)
        ids = [start, *tokenizer(prompt or "", add_special_tokens=False).input_ids]

    words = Words(tokenizer, [ends] if isinstance(ends, int) else list(ends))
    model = PretrainedCaptioner(model.to(device), words, torch.tensor(ids), processor, settings)
    image = model.prepare(torch.zeros(3, 64, 96, dtype=torch.uint8))
    if image.shape[1] != image.shape[2]:
        raise InputError(f"{name} does not read square images, which is not supported: give "
                         "another captioner")
    model.log_p(image[None], torch.tensor([[words.start, words.end]]))      # does it run?
    return model, words


def description(model, tokenizer, processor):
    """What captions and explanations depend on besides the weights, as JSON; not where it lies, and
    which version of the library wrote it."""
    settings = []
    for part in (model.config, model.generation_config, processor):
        content = part.to_dict()
        settings.append({key: value for key, value in content.items() if not key.startswith("_")
                         and key not in ("name_or_path", "transformers_version")})
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings.append(backend.to_str() if backend else tokenizer.get_vocab())
    return json.dumps(settings, sort_keys=True, default=str)


def check_size(name, config, device):
    """InputError if a folder's weights do not fit into memory; a sentence if they take long."""
    size = sum(path.stat().st_size for kind in ("*.safetensors", "*.bin")
               for path in Path(name).glob(kind))
    stored = str(getattr(config, "dtype", None)).removeprefix("torch.")
    size *= 4 / getattr(torch, stored, torch.float32).itemsize
    check_memory(1.25 * size, f"explaining {name} in float32", "use a smaller model")
    if size > 4e9 and str(device) == "cpu":
        print(f"{name} has {size / 4e9:.1f} billion weights, {size / 1e9:.0f} GB: on a CPU each "
              "word takes minutes to explain")


def prompt_of_images(processor, model, prompt):
    """The ids of a prompt with the tokens in whose place a language model reads the image.

    InputError for a model that reads more than text and an image."""
    model_type = model.config.model_type
    text = PROMPTS.get(model_type, DESCRIBE) if prompt is None else prompt
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}],
                                             add_generation_prompt=True)
    elif model_type == "llava":
        text = f"USER: {processor.image_token}\n{text} ASSISTANT:"
    inputs = processor(images=[np.zeros((3, 64, 64), np.uint8)], text=[text])
    more = set(inputs) & set(inspect.signature(model.forward).parameters) - READ
    if more and model_type not in TYPED:
        raise InputError(f"models of the type {model_type} also read {', '.join(sorted(more))}, "
                         "which is not supported: use another model")
    return inputs["input_ids"][0]
