"""Captioners of `transformers`: relevance that adds up, words, photographs, and bad input."""
import copy
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import oracle
import pretrained_models as tiny
import pytest
import torch
from helpers import Code, assert_close, call, refused
from made_up import random_image
from torch import nn
from torch.nn import functional as F
from transformers import BlipForConditionalGeneration

import evaluation
import explain as script
from captioning import checkpoint, explain, grounding, pretrained
from captioning.explanation import functions, rules
from captioning.explanation.attn_lrp import GammaLinear
from captioning.explanation.methods import METHODS, SPLIT
from captioning.explanation.rules import LRP, Gamma
from captioning.pretrained import relevance
from captioning.pretrained.captioner import PretrainedCaptioner
from captioning.pretrained.passes import Cut
from captioning.pretrained.words import Words
from captioning.report.explained_image import ExplainedImage

TEXTS = ("a dog running on grass", "the cat.")
# RMSNorm computes in float32 by itself
EXACT = {"llava": 2e-6, "paligemma": 2e-6, "smolvlm": 2e-6, "gemma3": 2e-6}


def captioner(name):
    """A tiny model; its prompt is <start> and "a", after the tokens of the image."""
    slots, _ = tiny.MODELS[name]
    words = Words(tiny.tokenizer(), [tiny.END])
    prompt = torch.tensor([tiny.IMAGE] * slots + [tiny.START, tiny.WORDS.index("a")])
    return PretrainedCaptioner(tiny.make(name), words, prompt)


def images(count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()


def captions(words, texts=TEXTS):
    """Ids of the texts' words (B, T+1), from <start> to <end>, zero-padded."""
    rows = [torch.tensor(words.ids_of(text)) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def total(explanation):
    return sum(getattr(explanation, part) for part in SPLIT)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_parts_add_up_and_nothing_else_changes(name):
    model = captioner(name)
    ids = captions(model.words)
    pixels = images()
    tolerance = EXACT.get(name, 1e-12)
    log_p = model.log_p(pixels, ids)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    explanation = model.lrp(pixels, ids)
    assert_close(total(explanation), explanation.targets, tolerance)
    assert (explanation.image.abs() > 1e-3)[ids[:, 1:] != 0].all()

    # the rule changes no value, and does not outlive the pass
    assert_close(explanation.word_log_p, log_p)
    assert not rules.active.rules
    hooks = [hook for module in model.model.modules()
             for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
    assert not any(isinstance(getattr(hook, "__self__", None), Cut) for hook in hooks)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())

    # an image in a batch is explained like alone, also at single steps, one after the other
    alone = model.lrp(pixels[1:], ids[1:, :5], steps=torch.tensor([[2, 0]]), chunk=1)
    for field in ("targets", "words", "pixels", "attention", "image"):
        values = getattr(explanation, field)[1:, [2, 0]]
        values = values[..., :4] if field == "words" else values
        assert_close(getattr(alone, field), values)

    # AttnLRP, in which the constants of softmax are counted
    explanation = model.attn_lrp(pixels[:1], ids[:1], pixels=False)
    assert_close(total(explanation), explanation.targets, tolerance)

    # no piece is predicted from those that follow it
    pieces, _ = model.pieces_of(ids[0])
    other = torch.cat([pieces[:2], pieces[2:].flip(0)])
    expected, logits = (model.logits(pixels[:1], values)[:3] for values in (pieces, other))
    assert_close(logits, expected, tolerance)

    # teacher-forced, the model's own caption has its most probable pieces (in float32: an earlier
    # PaliGemma generates with a mask of that type)
    model.model.float()
    own = model.caption(pixels[:1], "greedy", max_len=5)[0]
    pieces, _ = model.pieces_of(F.pad(own, (1, 0), value=model.words.start))
    assert torch.equal(model.logits(pixels[:1], pieces).argmax(-1), pieces)


@pytest.mark.parametrize("name", ["vit_gpt2", "swin_gpt2", "git"])
@pytest.mark.parametrize("gamma", [False, True])
def test_relevance_of_patches_and_constants_of_the_encoder_add_up_to_the_image(name, gamma):
    model = captioner(name)
    ids = captions(model.words)[:1]
    encoder_rule = GammaLinear(0.25, 0) if gamma else LRP(0)
    encoder_rule.one = one = torch.ones((), dtype=torch.float64, requires_grad=True)
    pixels = images(1).requires_grad_()
    cut, _, targets, rows = model.run(pixels, ids[0], LRP(0), encoder_rule)
    r, = torch.autograd.grad(targets, cut.features[0], rows[1])
    r_pixels, r_one = torch.autograd.grad(cut.outputs[0], (pixels, one), r)
    relevance = (r_pixels * pixels).sum((0, 1))
    expected = (r * cut.features[0]).sum()
    assert_close(relevance.sum() + r_one, expected)

    # the maps are the sums of patches, spread over them
    explanation = model.lrp(pixels.detach(), ids, rule=Gamma() if gamma else None)
    side = 4 if name == "swin_gpt2" else 8
    patches = F.avg_pool2d(relevance[None, None], side).repeat_interleave(side, 2)
    patches = patches.repeat_interleave(side, 3)[0].detach()
    assert_close(explanation.pixels[0, 1], patches)


def test_words_pass_a_small_encoder_together(monkeypatch):
    model = captioner("vit_gpt2")
    ids = captions(model.words)[:1]
    expected = model.lrp(images(1), ids, chunk=1).pixels
    chunks = []
    through_encoder = relevance.attribution.through_encoder

    def watched(maps, image, r_maps, chunk):
        chunks.append(chunk)
        return through_encoder(maps, image, r_maps, chunk)
    monkeypatch.setattr(relevance.attribution, "through_encoder", watched)
    torch.testing.assert_close(model.lrp(images(1), ids).pixels, expected, rtol=0, atol=1e-12)
    monkeypatch.setattr(relevance, "FEW", 1)
    model.lrp(images(1), ids)
    assert chunks[0] > 7 and chunks[1] == 1


@pytest.mark.parametrize("name", ["vit_gpt2", "llava"])
def test_eager_and_fused_attention_agree(name):
    model = captioner(name)
    ids = captions(model.words)[:1]
    fused = [method(images(1), ids) for method in (model.lrp, model.attn_lrp)]
    model.model.set_attn_implementation("eager")
    eager = [method(images(1), ids) for method in (model.lrp, model.attn_lrp)]
    for a, b in zip(fused, eager, strict=True):
        # eager attention rounds its weights to float32
        for field in ("words", "pixels", "features", "attention"):
            assert_close(getattr(a, field), getattr(b, field), 1e-5)


def test_words_are_the_sums_of_their_pieces():
    """Relevance of words from the derivative of each piece's logit by itself."""
    model = captioner("vit_gpt2")
    words = model.words
    ids = captions(words)[:1]
    assert [words.words[i] for i in ids[0, 1:-1].tolist()] == TEXTS[0].split()
    pieces, word = model.pieces_of(ids[0])
    assert word.tolist() == [0, 1, 2, 2, 3, 4, 5]
    explanation = model.lrp(images(1), ids)
    cut, logits, targets, _ = model.run(images(1), ids[0], LRP(0), LRP(0))
    assert torch.equal(targets, logits[range(7), pieces])
    expected = torch.zeros(6, 6, dtype=torch.float64)
    columns = [0, 0, 1, 2, 3, 3, 4, 5]          # <start>, the prompt's "a", and six pieces
    for piece, target in enumerate(targets):
        r = torch.autograd.grad(target, cut.embeddings, retain_graph=True)
        for leaf, derivative in zip(cut.embeddings, r, strict=True):
            for place, value in enumerate((leaf * derivative).sum(-1)[0].tolist()):
                expected[word[piece], columns[place]] += value
    assert_close(explanation.words[0], expected)
    sums = torch.zeros(6, dtype=torch.float64).index_add(0, word, targets.detach())
    torch.testing.assert_close(explanation.targets[0], sums)
    torch.testing.assert_close(explanation.word_logits[0], sums)


def test_a_contrast_is_the_first_piece_that_differs():
    model = captioner("vit_gpt2")
    ids = captions(model.words)[:1]
    _, other, _ = model.words.ids_of("runs")
    explanation = model.lrp(images(1), ids, contrast=other)
    _, logits, _, _ = model.run(images(1), ids[0], LRP(0), LRP(0))
    dog, running = logits[1], logits[3]
    piece = {text: i for i, text in enumerate(tiny.WORDS)}
    expected = torch.stack([dog[piece["dog"]] - dog[piece["run"]],
                            running[piece["##ning"]] - running[piece["##s"]]])
    torch.testing.assert_close(explanation.targets[0, [1, 2]], expected.detach())
    assert_close(total(explanation), explanation.targets)
    # also where the targets are differences to the other words
    specific = model.lrp_specific(images(1), ids, contrast=other)
    torch.testing.assert_close(specific.word_logits, explanation.targets)


def test_lost_relevance_is_named(monkeypatch):
    model = captioner("vit_gpt2")
    ids = captions(model.words)[:1]

    def half(rule, function, x, shape, *args, **kwargs):
        return functions.halved(rules.layer_norm(rule, function, x, shape, *args, **kwargs))
    monkeypatch.setitem(LRP.table, "layer_norm", half)
    with pytest.warns(UserWarning, match="relevance is lost in the function layer_norm"):
        model.lrp(images(1), ids, pixels=False)


# relevance of the words of "the cat." in the tiny LLaVA by LXT 2.1: its functions
# patches.gated_mlp_forward, rms_norm_forward and wrap_attention_forward (for "lrp"
# cp_wrap_attention_forward) in place of those of modeling_llama in transformers 5.24, with eager
# attention, and gradient times embedding, summed over the tokens of each word
LXT = {
    "lrp": [[1.2238438, 0, 0, 0], [0.1982945, 0.2386881, 0, 0],
            [0.1781596, -0.0386429, -0.5661899, 0],
            [-0.1592775, -0.0021231, -0.0150621, -0.0217894]],
    "attn_lrp": [[0.2980768, 0, 0, 0], [0.0766103, 0.3228655, 0, 0],
                 [0.1012488, -0.0047879, -0.6618659, 0],
                 [0.0382453, 0.0025859, -0.0086105, -0.0613353]]}


@pytest.mark.parametrize("method", LXT)
def test_relevance_equals_that_of_lxt(method):
    if not tiny.transformers.__version__.startswith("5."):
        pytest.skip("random weights depend on their order in the model")
    model = captioner("llava")
    model.model.set_attn_implementation("eager")
    words = getattr(model, method)(images(1), captions(model.words, TEXTS[1:]), pixels=False).words
    # both normalise in float32
    assert_close(words[0], torch.tensor(LXT[method], dtype=torch.float64), 1e-6)


# -- the oracle: equations in loops ----------------------------------------------------------------


def linear(x, weight, bias):
    return [oracle.affine(weight, bias, vector) for vector in x]


def linear_rule(x, weight, z, relevance):
    """ε = 0"""
    return [oracle.linear_rule(weight, *row, 0) for row in zip(x, z, relevance, strict=True)]


def norm(x, layer):
    """LayerNorm, y_j = Σ_i (δ_ij − 1/d) w_j/σ x_i + b_j, and this weight of each row of x."""
    weights = []
    for vector in x:
        d = len(vector)
        mean = sum(vector) / d
        sigma = math.sqrt(sum((v - mean) ** 2 for v in vector) / d + layer.eps)
        weights.append([[((i == j) - 1 / d) * w / sigma for i in range(d)]
                        for j, w in enumerate(layer.weight.tolist())])
    bias = layer.bias.tolist()
    return [oracle.affine(w, bias, v) for w, v in zip(weights, x, strict=True)], weights


def norm_rule(x, weights, y, relevance):
    """A linear layer with the constant σ."""
    return [oracle.linear_rule(*row, 0) for row in zip(weights, x, y, relevance, strict=True)]


def attention_layer(x, heads, q, k, v, causal):
    """Weights (heads, n, m), values (m, d) and the result (n, d); q, k, v: (weight, bias)."""
    queries, keys, values = (linear(x, *layer) for layer in (q, k, v))
    size = len(queries[0]) // heads
    weights = [[] for _ in range(heads)]
    result = [[0.0] * len(queries[0]) for _ in x]
    for head, n in np.ndindex(heads, len(x)):
        part = range(head * size, (head + 1) * size)
        scores = [sum(queries[n][i] * key[i] for i in part) / math.sqrt(size)
                  for key in (keys[:n + 1] if causal else keys)]
        weights[head].append(oracle.softmax(scores))
        for i in part:
            result[n][i] = sum(a * value[i] for a, value in
                               zip(weights[head][n], values, strict=False))
    return weights, values, result


def attention_rule(weights, values, result, relevance):
    """Weights are constants: value m receives its share a_nm v_m / Σ_m a_nm v_m of result n."""
    size = len(values[0]) // len(weights)
    r = [[0.0] * len(values[0]) for _ in values]
    for head, rows in enumerate(weights):
        for n, row in enumerate(rows):
            for m, a in enumerate(row):
                for i in range(head * size, (head + 1) * size):
                    r[m][i] += a * values[m][i] / result[n][i] * relevance[n][i]
    return r


def sum_rule(a, b, relevance):
    """R(a) = a / (a + b) R, and the same for b."""
    rows = zip(a, b, relevance, strict=True)
    return zip(*(oracle.sum_rule([x, y], oracle.add(x, y), r, 0) for x, y, r in rows), strict=True)


def pair(layer):
    """(weight with one row per output, bias) of nn.Linear or GPT-2's Conv1D."""
    weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
    return weight.tolist(), layer.bias.tolist()


def block_rule(x, y, relevance, first, second, norm1, norm2, heads, q, k, v, out, causal, gelu):
    """Relevance (n, d) at the input x of a pre-norm transformer layer; y: its own result."""
    normed, by1 = norm(x, norm1)
    weights, values, mixed = attention_layer(normed, heads, q, k, v, causal)
    projected = linear(mixed, *out)
    middle = oracle.add_regions(x, projected)
    normed2, by2 = norm(middle, norm2)
    hidden = linear(normed2, *first)
    active = gelu(torch.tensor(hidden, dtype=torch.float64)).tolist()
    last = linear(active, *second)
    assert_close(torch.tensor(oracle.add_regions(middle, last), dtype=torch.float64), y)

    r_middle, r_last = sum_rule(middle, last, relevance)
    r_active = linear_rule(active, second[0], last, r_last)       # that of hidden: unchanged
    r_normed2 = linear_rule(normed2, first[0], hidden, r_active)
    r_middle = oracle.add_regions(r_middle, norm_rule(middle, by2, normed2, r_normed2))
    r_x, r_projected = sum_rule(x, projected, r_middle)
    r_mixed = linear_rule(mixed, out[0], projected, r_projected)
    r_values = attention_rule(weights, values, mixed, r_mixed)
    r_normed = linear_rule(normed, v[0], values, r_values)
    return oracle.add_regions(r_x, norm_rule(x, by1, normed, r_normed))


@pytest.mark.parametrize("part", ["ViT layer", "GPT-2 layer"])
def test_a_layer_has_the_relevance_of_the_equations_in_loops(part):
    model = tiny.make("vit_gpt2")
    n = 4
    x = torch.randn(1, n, 16, generator=torch.Generator().manual_seed(3)).double()
    if part == "ViT layer":
        layer = next(module for module in model.encoder.modules()
                     if type(module).__name__ == "ViTLayer")
        modules = dict(layer.named_modules())
        linears = [module for module in modules.values() if isinstance(module, torch.nn.Linear)]
        norms = [module for module in modules.values() if isinstance(module, torch.nn.LayerNorm)]
        q, k, v, out, first, second = map(pair, linears)
        causal, gelu = False, F.gelu
    else:
        layer = copy.deepcopy(model.decoder.transformer.h[0])
        both, bias = pair(layer.attn.c_attn)
        q, k, v = ((both[i:i + 16], bias[i:i + 16]) for i in (0, 16, 32))
        out, first, second = map(pair, (layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj))
        norms = layer.ln_1, layer.ln_2
        causal, gelu = True, nn.GELU(approximate="tanh")
    layer.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    mask = torch.full((n, n), -math.inf, dtype=torch.float64).triu(1)[None, None]
    with LRP(0):
        y = layer(leaf, *((None, mask) if causal else ()))
        y = y[0] if isinstance(y, tuple) else y
    weights = torch.randn(n, 16, generator=torch.Generator().manual_seed(4)).double()
    r, = torch.autograd.grad((y[0] * weights).sum(), leaf)
    expected = block_rule(x[0].tolist(), y[0].detach(), (y[0] * weights).tolist(), first, second,
                          *norms, 2, q, k, v, out, causal, gelu)
    assert_close((x * r)[0], torch.tensor(expected, dtype=torch.float64), 1e-10)


# -- folders, scripts and photographs --------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: a folder that `save_pretrained` wrote}, made on first use."""
    class Folders(dict):
        def __missing__(self, name):
            self[name] = str(tiny.save(name, tmp_path_factory.mktemp(name)))
            return self[name]
    return Folders()


@pytest.fixture
def photograph(tmp_path):
    random_image((96, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def run_explain(*flags):
    call(script, *flags, "--device", "cpu")


@pytest.mark.parametrize("name", ["git", "vit_gpt2"])
def test_explain_draws_maps_where_the_model_sees_the_image(folders, photograph, name, tmp_path):
    methods = [method for method in METHODS if "guided" not in method]
    run_explain("--weight", folders[name], "--images", photograph, "--caption", TEXTS[0],
                "--methods", *methods, "--save_path", tmp_path / "out")
    explained = ExplainedImage.load(tmp_path / "out" / "photo")
    assert explained.caption == TEXTS[0]
    assert np.abs(sum(explained.split.values()) - explained.logits).max() < 1e-4
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert ("17 to 83 % of the width" in page) == (name == "git")
    for method in methods:
        heatmap = np.abs(explained.heatmap("dog", method))
        assert heatmap.shape == (64, 96) and heatmap.max() > 0
        if name == "git":       # the processor crops the square in the middle
            assert heatmap[:, :14].max() == heatmap[:, 82:].max() == 0


def test_two_models_are_compared_on_one_page(folders, photograph, tmp_path):
    other = photograph.with_name("another.png")
    other.write_bytes(photograph.read_bytes())
    for _ in range(2):      # the second time nothing is left to do, and the folders are the same
        run_explain("--weight", folders["vit_gpt2"], "--compare_weight", folders["git"],
                    "--images", photograph, other, "--methods", "attention", "--caption", "a dog",
                    "--save_path", tmp_path / "out")
    names = [path.name for path in sorted((tmp_path / "out").iterdir()) if path.is_dir()]
    assert [name[:9] for name in names] == ["another_1", "another_2", "photo_1_v", "photo_2_g"]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    places = [page.index(f'"name":"{name}"') for name in (*names[2:], *names[:2])]
    assert places == sorted(places)


def test_prompts_and_images_among_tokens(folders, photograph):
    model, words = pretrained.load(folders["llava"], prompt="describe the image")
    assert int(model.is_image.sum()) == 16
    shown = words.tokenizer.decode(model.prompt[~model.is_image])
    assert shown == "[CLS] user : describe the image [UNK] :"
    explained = explain(photograph, weight=folders["llava"], prompt="describe the image",
                        caption=TEXTS[1], methods=("attn_lrp", "attention"))
    assert explained.words == ["the", "cat", ".", "<end>"]
    with refused("--prompt is for models of transformers"):
        checkpoint.load(checkpoint.PHOTOGRAPHS, prompt="a")


@pytest.mark.parametrize(("name", "prompt"), [
    ("blip2", "[CLS]"), ("paligemma", "[CLS] caption [UNK]"),
    ("smolvlm", "[CLS] user : <fake_token_around_image> <global-img> <fake_token_around_image> "
     "describe the image"), ("gemma3", "[CLS] user : <boi> <eoi> describe the image")])
def test_language_models_with_their_own_processors(folders, name, prompt, tmp_path):
    if name == "smolvlm":
        pytest.importorskip("num2words")        # without which its processor does not work
    if name == "paligemma" and tiny.transformers.__version__ < "5":
        pytest.skip("this version accepts no tokenizer but Gemma's")
    photograph = Path(__file__).parents[1] / "docs" / "figures" / "cat.jpg"
    model, words = pretrained.load(folders[name])
    assert int(model.is_image.sum()) == tiny.MODELS[name][0]
    assert words.tokenizer.decode(model.prompt[~model.is_image]).startswith(prompt)
    if name == "gemma3":        # whose image tokens see each other
        types = model.text(model.prompt[None])["token_type_ids"]
        assert torch.equal(types, model.is_image[None].long())
    run_explain("--weight", folders[name], "--images", photograph, "--methods", "lrp", "attention",
                "--max_len", "5", "--save_path", tmp_path)
    for explained in (ExplainedImage.load(tmp_path / "cat"),
                      explain(photograph, weight=folders[name], caption=TEXTS[0])):
        assert np.abs(sum(explained.split.values()) - explained.logits).max() < 1e-4
        assert np.abs(explained.heatmap(0)).max() > 0
    with refused("outside the model.s vocabulary.*<image>"):
        explain(photograph, weight=folders[name], caption="a <image>")


def test_padding_and_cropping_are_measured(folders):
    model, _ = pretrained.load(folders["vit_gpt2"])
    for size in ((90, 60), (1, 1), (2, 5), (300, 2), (2, 300)):
        assert model.window(*size) == (0, 0, 1, 1)
    model, _ = pretrained.load(folders["git"])
    assert model.window(90, 60) == pytest.approx((1 / 6, 0, 5 / 6, 1), abs=0.02)

    def padded(images, **options):      # black bars above and below
        values = torch.from_numpy(images[0]).float()[None] / 255 - 0.5
        values = F.interpolate(values, size=(20, 32), mode="bilinear", antialias=True)
        return {"pixel_values": F.pad(values, (0, 0, 6, 6))}
    model.image_processor = padded
    model.window.cache_clear()
    assert model.window(96, 60) == pytest.approx((0, -0.3, 1, 1.3), abs=0.03)


def test_an_explanation_depends_on_more_than_weights(folders, photograph, tmp_path, capsys):
    """It is made again after changes of the processor and of what captions are generated by."""
    folder = tmp_path / "model.1"
    shutil.copytree(folders["vit_gpt2"], folder)

    def run():
        before = explain(photograph, weight=folder, caption="a dog").logits
        run_explain("--weight", folder, "--images", photograph, "--methods", "lrp", "--max_len", 3,
                    "--save_path", tmp_path / "out")
        return "already explained" in capsys.readouterr().out, before
    assert not run()[0]
    reused, before = run()
    assert reused
    for name, change in (("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3]}),
                         ("generation_config.json", {"repetition_penalty": 1.5})):
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(content | change), encoding="utf-8")
        reused, logits = run()
        assert not reused
        if name.startswith("pre"):      # also in Python, where models are kept
            assert not np.allclose(logits, before)
    assert grounding.calibration_path(folder).name == "model.1_grounding.json"


def test_captions_that_are_too_long_or_have_unknown_words(folders, photograph, tmp_path):
    weight = folders["vit_gpt2"]
    for text, message in (("a dog " * 40, "longer than the model reads"),
                          ("a zebra", "outside the model's vocabulary.*zebra"),
                          ("a [SEP] dog", r"outside the model's vocabulary.*\[SEP\]"),
                          ("a \udcff", "outside the model's vocabulary")):
        with refused(message):
            explain(photograph, weight=weight, caption=text)
    with refused("outside the model's vocabulary.*zebra"):
        explain(photograph, weight=weight, caption="a dog", contrast="zebra")
    # longer than the model's positions are only those that are given
    run_explain("--weight", weight, "--images", photograph, "--methods", "attention", "--max_len",
                "500", "--save_path", tmp_path / "out")
    # of one image, a given caption is skipped
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"photo.png": "a zebra", "b.png": "a dog"}), "utf-8")
    shutil.copy(photograph, tmp_path / "b.png")
    with refused("1 of 2 images"):
        run_explain("--weight", weight, "--images", photograph, tmp_path / "b.png", "--methods",
                    "attention", "--captions", captions, "--save_path", tmp_path / "given")
    assert ExplainedImage.load(tmp_path / "given" / "b").caption == "a dog"


def test_a_contrast_has_the_pieces_of_a_word_after_another():
    """As in GPT-2, whose pieces of words after a space contain the space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    pieces = ["a", "cat", "Ġcat", "Ġdog", "<end>"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = Words(tiny.transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>"), [4])
    caption = words.ids_of("a cat")
    assert words.pieces[words.within("cat")] == (2,) and words.within("cat") == caption[2]
    assert words.pieces[words.ids_of("cat")[1]] == (1,)


def test_evaluation_measures_captions_and_explanations(folders, demo_data, tmp_path):
    model = tiny.make("deit_bert").float()
    with torch.no_grad():       # captions with objects
        bias = model.decoder.get_output_embeddings().bias
        bias[[tiny.WORDS.index(word) for word in ("dog", "cat")]] += 6
        bias[tiny.END] -= 6
        model.decoder.cls.predictions.bias.copy_(bias)
    model.save_pretrained(folders["deit_bert"])
    flags = ["--weight", folders["deit_bert"], "--dataset", "demo", "--data_folder", demo_data,
             "--max_len", "6", "--device", "cpu", "--workers", "0", "--max_images", "2",
             "--methods", "lrp", "attention", "random", "--save_path", tmp_path, "--metrics",
             "bleu", "cider", "--explanations", "ablation", "correctness", "tpfp",
             "deletion_insertion", "pointing_game", "mask_mass", "grounding"]
    call(evaluation, *flags)
    metrics = json.loads((tmp_path / "metrics_test.json").read_text(encoding="utf-8"))
    assert {"bleu_4", "cider"} <= metrics.keys()
    # the random model names objects that are not in these images, which have no box there
    for experiment in ("tpfp", "deletion_insertion", "grounding"):
        rows = (tmp_path / f"{experiment}_words_test.csv").read_text(encoding="utf-8")
        assert "lrp" in rows
    with refused("sanity randomises"):
        call(evaluation, *flags, "sanity")


def spoil(folder, way):
    """Makes an invalid model of a folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    if way == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif way == "no weights":
        weights.unlink()
    elif way == "damaged weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif way == "code among the weights":
        weights.unlink()
        torch.save({"weight": Code(folder / "executed")}, folder / "pytorch_model.bin")
    elif way == "weights missing":
        from safetensors.torch import load_file, save_file
        state = load_file(weights)
        del state["decoder.transformer.h.0.ln_1.weight"]
        save_file(state, weights, {"format": "pt"})
    elif way == "text only":
        tiny.transformers.GPT2LMHeadModel(tiny.transformers.GPT2Config(
            n_embd=8, n_layer=1, n_head=1, **tiny.TEXT)).save_pretrained(folder)
    elif way == "tiles":
        tiny.transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=[[64, 64]]).save_pretrained(folder)
    elif way == "no config":
        (folder / "config.json").write_text("{}", encoding="utf-8")
    else:
        classes = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
        changes = {"unknown type": {"model_type": "of_tomorrow"},
                   "other encoder": {"encoder": config["decoder"]},
                   "code of its own": {"model_type": "own", "auto_map": classes}}[way]
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w')", encoding="utf-8")


@pytest.mark.parametrize(("way", "message"), [
    ("no processor", "cannot be loaded as a captioner"), ("no weights", "cannot be loaded"),
    ("damaged weights", "cannot be loaded"), ("code among the weights", "cannot be loaded"),
    ("weights missing", "lacks weights of its model, decoder.transformer.h.0.ln_1.weight"),
    ("text only", "is a model of the type gpt2"), ("tiles", "tiles"),
    ("no config", "cannot be loaded"), ("unknown type", "cannot be loaded"),
    ("other encoder", "has no image encoder|cannot be loaded|lacks weights"),
    ("code of its own", "cannot be loaded")])
def test_what_is_no_captioner_is_refused_in_one_sentence(tmp_path, way, message):
    folder = tiny.save("vit_gpt2", tmp_path)
    spoil(folder, way)
    with refused(message) as error:
        pretrained.load(str(folder))
    assert len(str(error.value)) < 500
    assert not (folder / "executed").exists()


def test_what_a_captioner_cannot_do_is_refused(folders, photograph, tmp_path, monkeypatch):
    flags = ["--weight", folders["vit_gpt2"], "--images", photograph, "--save_path", tmp_path / "o"]
    with refused("guided_backprop is not defined"):
        run_explain(*flags, "--methods", "guided_backprop")
    with refused("for which --grounded cannot"):
        run_explain(*flags, "--grounded")
    with refused("attn_lrp is not defined"):
        explain(photograph, methods=("attn_lrp",))
    monkeypatch.setattr("transformers.__version__", "4.55.4")
    with refused("4.56 or newer .version 4.55.4 is installed.: pip"):
        checkpoint.load(folders["vit_gpt2"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("pip install --upgrade transformers"):
        checkpoint.load(folders["vit_gpt2"])


@pytest.mark.parametrize("decoding", [["greedy"], ["beam_search", "--beam_size", "2"],
                                      ["sample", "--temperature", "2", "--top_k", "5"]])
def test_decoding_flags_reach_the_library(folders, photograph, tmp_path, decoding, monkeypatch):
    given = []
    generate = BlipForConditionalGeneration.generate

    def watched(*args, **options):
        given.append(options)
        return generate(*args, **options)
    monkeypatch.setattr(BlipForConditionalGeneration, "generate", watched)
    for attempt in ("a", "b"):
        run_explain("--weight", folders["blip"], "--images", photograph, "--methods", "attention",
                    "--max_len", "4", "--quiet", "--save_path", tmp_path / attempt, "--decoding",
                    *decoding)
    a, b = (ExplainedImage.load(tmp_path / attempt / "photo").words for attempt in ("a", "b"))
    assert a == b       # sampling too: its seed is the image's
    flags = dict(zip(decoding[1::2], decoding[2::2], strict=True))
    names = {"--beam_size": "num_beams", "--temperature": "temperature", "--top_k": "top_k"}
    for flag, value in flags.items():
        assert given[0][names[flag]] == float(value)
