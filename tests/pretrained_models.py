"""Tiny captioners of `transformers` with random weights, in float64, and folders of them."""
import pytest
import torch

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<image>", "a", "dog", "cat", "run", "##ning", "on",
         "grass", "red", "ball", "the", "with", "##s", ",", ".", "house", "user", ":", "describe",
         "image", "caption"]
V = len(WORDS)
PAD, START, END, IMAGE = 0, 1, 2, 4
TEXT = {"vocab_size": V, "bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 24}
IMAGES = SIZES | {"image_size": 32, "patch_size": 8}
TEMPLATE = ("User:{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>"
            "{% else %}{{part['text']}}{% endif %}{% endfor %}<end_of_utterance>Assistant:")


def joined(encoder, decoder):
    """The model of an image encoder and a decoder, "gpt2" or "bert"."""
    options = {"is_decoder": True, "add_cross_attention": True}
    if decoder == "gpt2":
        decoder = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **options,
                                          **TEXT)
    else:
        decoder = transformers.BertConfig(**SIZES, **options, **TEXT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = START
    config.pad_token_id = PAD
    config.eos_token_id = END
    return transformers.VisionEncoderDecoderModel(config)


def blip():
    text = SIZES | TEXT | {"encoder_hidden_size": 16, "max_position_embeddings": 32,
                           "sep_token_id": END}
    config = transformers.BlipConfig(vision_config=IMAGES, text_config=text)
    return transformers.BlipForConditionalGeneration(config)


def git():
    config = transformers.GitConfig(vision_config=IMAGES, **SIZES, **TEXT)
    return transformers.GitForCausalLM(config)


def blip2():
    text = TEXT | {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16,
                   "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
                   "max_position_embeddings": 64}
    former = SIZES | {"encoder_hidden_size": 16, "vocab_size": V}
    config = transformers.Blip2Config(vision_config=IMAGES, qformer_config=former, text_config=text,
                                      num_query_tokens=3, image_token_index=IMAGE)
    return transformers.Blip2ForConditionalGeneration(config)


def llama():
    return transformers.LlamaConfig(**SIZES, num_key_value_heads=1, **TEXT)


def llava():
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**IMAGES),
                                      text_config=llama(), image_token_index=IMAGE)
    return transformers.LlavaForConditionalGeneration(config)


def paligemma():
    text = transformers.GemmaConfig(**SIZES, num_key_value_heads=1, head_dim=8, **TEXT)
    config = transformers.PaliGemmaConfig(vision_config=transformers.SiglipVisionConfig(**IMAGES),
                                          text_config=text, image_token_index=IMAGE,
                                          projection_dim=16)
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3():
    text = transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=1, head_dim=8, **TEXT)
    config = transformers.Gemma3Config(vision_config=transformers.SiglipVisionConfig(**IMAGES),
                                       text_config=text, image_token_index=IMAGE,
                                       mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def smolvlm():
    config = transformers.SmolVLMConfig(vision_config=transformers.SmolVLMVisionConfig(**IMAGES),
                                        text_config=llama(), image_token_id=IMAGE, scale_factor=2)
    return transformers.SmolVLMForConditionalGeneration(config)


# each with the number of tokens of its prompt in whose place features of the image stand
MODELS = {
    "vit_gpt2": (0, lambda: joined(transformers.ViTConfig(**IMAGES), "gpt2")),
    "deit_bert": (0, lambda: joined(transformers.DeiTConfig(**IMAGES), "bert")),
    "beit_gpt2": (0, lambda: joined(transformers.BeitConfig(
        use_relative_position_bias=True, layer_scale_init_value=0.1, **IMAGES), "gpt2")),
    "swin_gpt2": (0, lambda: joined(transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
        "gpt2")),
    "clip_gpt2": (0, lambda: joined(transformers.CLIPVisionConfig(**IMAGES), "gpt2")),
    "dinov2_bert": (0, lambda: joined(transformers.Dinov2Config(mlp_ratio=2, **IMAGES), "bert")),
    "blip": (0, blip), "git": (0, git), "blip2": (3, blip2), "llava": (16, llava),
    "paligemma": (16, paligemma), "smolvlm": (4, smolvlm), "gemma3": (4, gemma3)}


def make(name):
    """The model in float64 with random weights, those of normalisations around 1."""
    transformers.logging.set_verbosity_error()
    model = MODELS[name][1]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_scale = weight.dim() == 1 and parameter_name.endswith("weight")
            weight.copy_(0.3 * noise + is_scale)
    return model.double().eval()


def tokenizer(**tokens):
    """Words, and pieces of words that begin with ##; tokens: options of the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)},
                                        unk_token="[UNK]"))
    pieces.normalizer = normalizers.Lowercase()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    pieces.post_processor = processors.TemplateProcessing("[CLS] $A", "[CLS] $A $B",
                                                          [("[CLS]", START)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]",
        additional_special_tokens=["<image>"], **tokens)


def processor(name, words):
    """The processor of a model, which may add tokens to the tokenizer `words`."""
    size = {"height": 32, "width": 32}
    if name in ("git", "llava"):        # which crop the centre
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    elif name == "paligemma":
        images = transformers.SiglipImageProcessor(size=size)
        images.image_seq_length = 16
        return transformers.PaliGemmaProcessor(images, words)
    elif name == "gemma3":
        return transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size=size), words, image_seq_length=4,
            chat_template=TEMPLATE.replace("<image>", "<boi>"))
    elif name == "smolvlm":             # which cuts images into tiles
        words.add_tokens(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
                         special_tokens=True)
        images = transformers.SmolVLMImageProcessor(size={"longest_edge": 64},
                                                    max_image_size={"longest_edge": 32})
        return transformers.SmolVLMProcessor(images, words, transformers.SmolVLMVideoProcessor(),
                                             image_seq_len=4, chat_template=TEMPLATE)
    elif name == "blip2":
        images = transformers.BlipImageProcessor(size=size)
        return transformers.Blip2Processor(images, words, num_query_tokens=3)
    else:
        images = transformers.ViTImageProcessor(size=size)
    if name == "llava":
        return transformers.LlavaProcessor(images, words, patch_size=8,
                                           vision_feature_select_strategy="default",
                                           num_additional_image_tokens=1)
    return images


def save(name, folder):
    """Writes the model in float32 with its tokenizer and its processor."""
    model = make(name).float()
    tokens = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    words = tokenizer(extra_special_tokens=tokens) if name == "gemma3" else tokenizer()
    processor(name, words).save_pretrained(folder)
    if len(words) > V:
        model.resize_token_embeddings(len(words))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
