"""A reference implementation of LRP in plain Python floats, from docs/method.md alone.

Literal loops over neurons, regions, heads and steps, one explained word after the other, with its
own forward pass of the decoder. It is slow and shares nothing with the package but the names of the
parameters, so that each can be tested against the other.
"""
import math

import numpy as np
import torch
from torch import nn

from captioning.explanation.encoders import Residual

# -- elementary functions --------------------------------------------------------------------------


def sigmoid(z):
    """σ(z) = 1 / (1 + exp(−z))"""
    return 1 / (1 + math.exp(-z))


def relu(z):
    """max(z, 0)"""
    return z if z > 0 else 0.0


def softmax(scores):
    """exp(z_k) / Σ exp(z_l)"""
    top = max(scores)
    powers = [math.exp(z - top) for z in scores]
    return [p / sum(powers) for p in powers]


def affine(weight, bias, x):
    """z_j = Σ_i W_ji x_i + b_j"""
    z = []
    for j in range(len(weight)):
        total = bias[j] if bias is not None else 0.0
        for i in range(len(x)):
            total += weight[j][i] * x[i]
        z.append(total)
    return z


def mean_of(vectors):
    """(1/K) Σ_k f_k"""
    return [sum(f[i] for f in vectors) / len(vectors) for i in range(len(vectors[0]))]


def lstm_step(cell, x, h, c):
    """i, f, g, o = W_ih x + b_ih + W_hh h + b_hh; c' = σ(f) c + σ(i) tanh(g); h' = σ(o) tanh(c')"""
    z = add(affine(cell["W_ih"], cell["b_ih"], x), affine(cell["W_hh"], cell["b_hh"], h))
    d = len(h)
    step = {"x": x, "h_before": h, "h": [], "c": [], "kept": [], "new": [], "z_g": []}
    for n in range(d):
        kept = sigmoid(z[d + n]) * c[n]
        new = sigmoid(z[n]) * math.tanh(z[2 * d + n])
        step["z_g"].append(z[2 * d + n])
        step["kept"].append(kept)
        step["new"].append(new)
        step["c"].append(kept + new)
        step["h"].append(sigmoid(z[3 * d + n]) * math.tanh(kept + new))
    return step


# -- elementary rules ------------------------------------------------------------------------------


def share(part, whole, eps):
    """part / (whole + ε sign(whole)), sign(0) = +1; 0 where both are zero"""
    denominator = whole + (eps if whole >= 0 else -eps)
    return part / denominator if denominator != 0 else 0.0


def linear_rule(weight, x, z, relevance, eps):
    """R(x_i) = Σ_j W_ji x_i / (z_j + ε sign(z_j)) R(z_j)"""
    result = [0.0] * len(x)
    for j in range(len(z)):
        for i in range(len(x)):
            result[i] += share(weight[j][i] * x[i], z[j], eps) * relevance[j]
    return result


def sum_rule(parts, total, relevance, eps):
    """R(a) = a / (y + ε sign(y)) R(y), entry by entry, for each of the summands a of y"""
    return [[share(a[n], total[n], eps) * relevance[n] for n in range(len(total))] for a in parts]


def mean_rule(vectors, relevance, eps):
    """R(f_k) = (f_k / K) / (y + ε sign(y)) R(y) with y = (1/K) Σ f_k"""
    parts = [[value / len(vectors) for value in f] for f in vectors]
    return sum_rule(parts, mean_of(vectors), relevance, eps)


def add(*vectors):
    """entry by entry"""
    return [sum(entries) for entries in zip(*vectors, strict=True)]


def lstm_rule(cell, step, r_h, r_c, eps):
    """R(c_i) = R(h_i) + what comes from step i+1; c_i = f c_{i-1} + i g by the sum rule.

    The part of i g reaches the pre-activation of g and by the ε-rule, both biases in the
    denominator, [x_i; h_{i-1}].

    Returns R(x_i), R(h_{i-1}), R(c_{i-1}).
    """
    d = len(step["c"])
    r_kept, r_new = sum_rule([step["kept"], step["new"]], step["c"], add(r_h, r_c), eps)
    r_x = linear_rule(cell["W_ih"][2 * d:3 * d], step["x"], step["z_g"], r_new, eps)
    r_h = linear_rule(cell["W_hh"][2 * d:3 * d], step["h_before"], step["z_g"], r_new, eps)
    return r_x, r_h, r_kept


def output_rule(p, word, z, c, h, eps):
    """R(p[w]) = p[w]; the ε-rule of W_o for ĉ + h, then the sum rule. Returns R(ĉ), R(h)."""
    total = add(c, h)
    r_total = linear_rule([p["W_o"][word]], total, [z[word]], [z[word]], eps)
    return sum_rule([c, h], total, r_total, eps)


# -- the parameters as plain lists -----------------------------------------------------------------


def parameters(model):
    """{name: nested list} of the decoder, biases as <name>.b (None where there is none)"""
    values = {}
    for name, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            values[name] = layer.weight.tolist()
            values[name + ".b"] = None if layer.bias is None else layer.bias.tolist()
        elif isinstance(layer, nn.Embedding):
            values["E"] = layer.weight.tolist()
        elif isinstance(layer, nn.LSTM | nn.LSTMCell):
            lists = [parameter.tolist() for parameter in layer.parameters()]
            values[name] = dict(zip(("W_ih", "W_hh", "b_ih", "b_hh"), lists, strict=True))
    return values


# -- Ada-LSTM --------------------------------------------------------------------------------------


def gridtd_score(p, projected, query):
    """w_aᵀ tanh(projected + query)"""
    return sum(w * math.tanh(a + q) for w, a, q in zip(p["w_a"][0], projected, query, strict=True))


def gridtd_attend(p, v, s, h1, query_per_region, regions):
    """α = softmax_k(z), β = last entry of softmax([z; z_s]); regions[k]: the row of region k."""
    query = affine(p["W_q"], None, h1)
    scores = []
    for k in range(len(v)):
        added = [query[regions[k]]] * len(query) if query_per_region else query
        scores.append(gridtd_score(p, affine(p["W_a"], p["W_a.b"], v[k]), added))
    sentinel = gridtd_score(p, affine(p["W_s"], p["W_s.b"], s), query)
    return softmax(scores), softmax(scores + [sentinel])[-1]


def gridtd_forward(p, f, tokens, query_per_region, regions):
    """The steps of the adaptive attention model, reading tokens one after the other"""
    d = len(p["W_v"])
    f_mean = mean_of(f)
    z_v = [affine(p["W_v"], p["W_v.b"], f_k) for f_k in f]
    z_g = affine(p["W_g"], p["W_g.b"], f_mean)
    v = [list(map(relu, z_k)) for z_k in z_v]
    g = list(map(relu, z_g))
    h1 = c1 = h2 = c2 = [0.0] * d
    steps = []
    for token in tokens:
        x1 = h2 + g + p["E"][token]
        one = lstm_step(p["lstm1"], x1, h1, c1)
        gate = add(affine(p["W_x"], p["W_x.b"], x1), affine(p["W_h"], p["W_h.b"], h1))
        h1, c1 = one["h"], one["c"]
        s = [sigmoid(gate[n]) * math.tanh(c1[n]) for n in range(d)]
        alpha, beta = gridtd_attend(p, v, s, h1, query_per_region, regions)
        c = [sum(alpha[k] * v[k][n] for k in range(len(v))) for n in range(d)]
        mixed = [beta * s[n] + (1 - beta) * c[n] for n in range(d)]
        two = lstm_step(p["lstm2"], mixed + h1, h2, c2)
        h2, c2 = two["h"], two["c"]
        logits = affine(p["W_o"], p["W_o.b"], add(mixed, h2))
        steps.append({"one": one, "two": two, "s": s, "alpha": alpha, "beta": beta, "c": c,
                      "mixed": mixed, "logits": logits})
    return {"steps": steps, "z_v": z_v, "z_g": z_g, "v": v, "f_mean": f_mean}


def gridtd_context_rule(step, v, r_mixed, eps):
    """ĉ = β s + (1−β) c by the sum rule, then c = Σ α_k v_k likewise.

    Returns R(s) and the R(v_k).
    """
    sentinel = [step["beta"] * value for value in step["s"]]
    context = [(1 - step["beta"]) * value for value in step["c"]]
    r_s, r_c = sum_rule([sentinel, context], step["mixed"], r_mixed, eps)
    parts = [[step["alpha"][k] * value for value in v[k]] for k in range(len(v))]
    return r_s, sum_rule(parts, step["c"], r_c, eps)


def gridtd_backward(p, f, run, t, word, eps):
    """The relevance of p_t[word] through steps t … 0. Returns the R(E[w_i]) and the R(f_k)."""
    d = len(p["W_v"])
    e = len(p["W_g"])
    v = run["v"]
    zero = [0.0] * d
    last = run["steps"][t]
    r_mixed, r_h2 = output_rule(p, word, last["logits"], last["mixed"], last["two"]["h"], eps)
    r_c2 = r_h1 = r_c1 = zero
    r_g = [0.0] * e
    r_v = [zero for _ in v]
    r_words = [None] * (t + 1)
    for i in range(t, -1, -1):
        step = run["steps"][i]
        r_x2, r_h2, r_c2 = lstm_rule(p["lstm2"], step["two"], r_h2, r_c2, eps)
        r_mixed = add(r_mixed, r_x2[:d])
        r_h1 = add(r_h1, r_x2[d:])
        r_s, r_regions = gridtd_context_rule(step, v, r_mixed, eps)
        r_v = [add(old, new) for old, new in zip(r_v, r_regions, strict=True)]
        r_x1, r_h1, r_c1 = lstm_rule(p["lstm1"], step["one"], r_h1, add(r_c1, r_s), eps)
        r_h2 = add(r_h2, r_x1[:d])
        r_g = add(r_g, r_x1[d:d + e])
        r_words[i] = r_x1[d + e:]
        r_mixed = zero
    r_mean = linear_rule(p["W_g"], run["f_mean"], run["z_g"], r_g, eps)
    return r_words, add_regions(regions_rule(p, f, run, r_v, eps), mean_rule(f, r_mean, eps))


# -- MH-FC -----------------------------------------------------------------------------------------


def aoa_attend(query, keys, heads):
    """α^m = softmax_k(q^m · k_k^m / sqrt(d/M))"""
    width = len(query) // heads
    alpha = []
    for m in range(heads):
        scores = []
        for key in keys:
            product = sum(query[n] * key[n] for n in range(m * width, (m + 1) * width))
            scores.append(product / math.sqrt(width))
        alpha.append(softmax(scores))
    return alpha


def aoa_forward(p, f, tokens, heads):
    """The steps of the multi-head attention model, reading tokens one after the other"""
    d = len(p["W_v"])
    width = d // heads
    z_v = [affine(p["W_v"], p["W_v.b"], f_k) for f_k in f]
    v = [list(map(relu, z_k)) for z_k in z_v]
    v_mean = mean_of(v)
    keys = [affine(p["W_K"], p["W_K.b"], v_k) for v_k in v]
    u = [affine(p["W_U"], p["W_U.b"], v_k) for v_k in v]
    h = c = [0.0] * d
    steps = []
    for token in tokens:
        lstm = lstm_step(p["lstm"], p["E"][token] + v_mean, h, c)
        h, c = lstm["h"], lstm["c"]
        alpha = aoa_attend(affine(p["W_Q"], p["W_Q.b"], h), keys, heads)
        context = [sum(alpha[n // width][k] * u[k][n] for k in range(len(u))) for n in range(d)]
        gate = affine(p["W_G"], p["W_G.b"], h)
        signal = affine(p["W_L"], p["W_L.b"], context)
        mixed = [sigmoid(gate[n]) * signal[n] for n in range(d)]
        logits = affine(p["W_o"], p["W_o.b"], add(mixed, h))
        steps.append({"lstm": lstm, "alpha": alpha, "context": context, "signal": signal,
                      "mixed": mixed, "logits": logits})
    return {"steps": steps, "z_v": z_v, "v": v, "u": u}


def aoa_context_rule(p, run, step, r_mixed, heads, head, eps):
    """σ(·) ⊙ (W_L c + b_L): all to the signal; the ε-rule of W_L; per head c = Σ α_k u_k by the
    sum rule, another head than the chosen one gets zero; the ε-rule of W_U. Returns the R(v_k)."""
    width = len(step["context"]) // heads
    r_context = linear_rule(p["W_L"], step["context"], step["signal"], r_mixed, eps)
    if head is not None:
        r_context = [r if n // width == head else 0.0 for n, r in enumerate(r_context)]
    parts = []
    for k, u_k in enumerate(run["u"]):
        parts.append([step["alpha"][n // width][k] * value for n, value in enumerate(u_k)])
    r_u = sum_rule(parts, step["context"], r_context, eps)
    return [linear_rule(p["W_U"], *item, eps) for item in zip(run["v"], run["u"], r_u, strict=True)]


def aoa_backward(p, f, run, t, word, heads, head, eps):
    """The relevance of p_t[word]: the attention at step t, the LSTM through steps t … 0.

    Returns the R(E[w_i]) and the R(f_k)."""
    d = len(p["W_v"])
    e = len(p["E"][0])
    last = run["steps"][t]
    r_mixed, r_h = output_rule(p, word, last["logits"], last["mixed"], last["lstm"]["h"], eps)
    r_v = aoa_context_rule(p, run, last, r_mixed, heads, head, eps)
    r_c = r_mean = [0.0] * d
    r_words = [None] * (t + 1)
    for i in range(t, -1, -1):
        r_x, r_h, r_c = lstm_rule(p["lstm"], run["steps"][i]["lstm"], r_h, r_c, eps)
        r_words[i] = r_x[:e]
        r_mean = add(r_mean, r_x[e:])
    r_v = add_regions(r_v, mean_rule(run["v"], r_mean, eps))
    return r_words, regions_rule(p, f, run, r_v, eps)


def regions_rule(p, f, run, r_v, eps):
    """R(v_k) → R(f_k): the ε-rule of W_v, the pre-activation in the denominator"""
    return [linear_rule(p["W_v"], f[k], run["z_v"][k], r_v[k], eps) for k in range(len(f))]


def add_regions(a, b):
    """region by region, entry by entry"""
    return [add(a_k, b_k) for a_k, b_k in zip(a, b, strict=True)]


# -- the CNN: output positions, channels and kernel positions one after the other ------------------


def pair(value):
    """PyTorch's int or pair of ints, as a pair"""
    return value if isinstance(value, tuple) else (value, value)


def backward(layer, x, relevance, shares, margin=0.0):
    """R(x_i) = Σ_j share_ij R(y_j) with shares(field) -> (J,C,·,·) of every receptive field"""
    (height, width), (down, right) = pair(layer.kernel_size), pair(layer.stride)
    rows, columns = pair(layer.padding)
    sides = ((0, 0), (rows, rows), (columns, columns))
    x = np.pad(x, sides, constant_values=margin)
    result = np.zeros_like(x)
    for row, column in np.ndindex(relevance.shape[1:]):
        top, left = row * down, column * right
        field = (slice(None), slice(top, top + height), slice(left, left + width))
        for j, share_of_j in enumerate(shares(x[field])):
            result[field] += share_of_j * relevance[j, row, column]
    return result[:, rows:x.shape[1] - rows, columns:x.shape[2] - columns]


def kernels(layer):
    """W_j (C,·,·) of every output channel, zero for the inputs of other groups"""
    _, width, *sides = layer.weight.shape
    for j, kernel in enumerate(layer.weight.detach().double().numpy()):
        first = j // (layer.out_channels // layer.groups) * width
        weight = np.zeros((layer.in_channels, *sides))
        weight[first:first + width] = kernel
        yield weight


def conv_rule(layer, x, relevance, eps):
    """R(x_i) = Σ_j (W⁺_ji x⁺_i + W⁻_ji x⁻_i) / z_j R(z_j), 0 where z_j = 0; z_j is their sum"""
    def shares(field):
        for weight in kernels(layer):
            products = np.maximum(weight, 0) * np.maximum(field, 0)
            products += np.minimum(weight, 0) * np.minimum(field, 0)
            yield products / products.sum() if products.sum() != 0 else 0 * products
    return backward(layer, x, relevance, shares)


def max_rule(layer, x, relevance, eps):
    """All to the winner, the first of equals in reading order"""
    def shares(field):
        for j, channel in enumerate(field):
            share_of_j = np.zeros_like(field)
            share_of_j[j][np.unravel_index(np.argmax(channel), channel.shape)] = 1
            yield share_of_j
    return backward(layer, x, relevance, shares, -np.inf)


def average_rule(layer, x, relevance, eps):
    """R(x_i) = (x_i / n) / (y + ε sign(y)) R(y), y = Σ_i x_i / n, the margin included"""
    def shares(field):
        for j, channel in enumerate(field / field[0].size):
            share_of_j = np.zeros_like(field)
            for where, part in np.ndenumerate(channel):
                share_of_j[j][where] = share(part, channel.sum(), eps)
            yield share_of_j
    return backward(layer, x, relevance, shares)


def residual_rule(block, x, relevance, eps):
    """The sum rule at the shortcut, y = body(x) + shortcut(x), each part on to x"""
    traces = [encoder_forward(branch, x) for branch in (block.body, block.shortcut)]
    y = traces[0][-1] + traces[1][-1]
    result = np.zeros_like(x)
    for branch, trace in zip((block.body, block.shortcut), traces, strict=True):
        part = np.zeros_like(y)
        for where in np.ndindex(y.shape):
            part[where] = share(trace[-1][where], y[where], eps) * relevance[where]
        result += encoder_rule(branch, trace, part, eps)
    return result


def margin_rule(layer, x, relevance, eps):
    """The relevance inside the margin"""
    left, _, top, _ = layer.padding
    return relevance[:, top:top + x.shape[1], left:left + x.shape[2]]


def sequence_rule(sequence, x, relevance, eps):
    """One layer after the other, from the last"""
    return encoder_rule(sequence, encoder_forward(sequence, x), relevance, eps)


def passed(layer, x, relevance, eps):
    """All relevance, as it is"""
    return relevance


RULES = {nn.Conv2d: conv_rule, nn.MaxPool2d: max_rule, nn.AvgPool2d: average_rule,
         nn.ZeroPad2d: margin_rule, nn.Sequential: sequence_rule, nn.ReLU: passed,
         nn.ReLU6: passed, Residual: residual_rule}


@torch.no_grad()
def encoder_forward(encoder, picture):
    """The inputs of every layer, and last the features, as PyTorch computes them"""
    trace = [np.asarray(picture, dtype=float)]
    for layer in encoder:
        trace.append(layer(torch.from_numpy(trace[-1])[None])[0].numpy())
    return trace


def encoder_rule(encoder, trace, relevance, eps):
    """The relevance of the features (C,h,w), back to the pixels (3,H,W)"""
    for layer, x in reversed(list(zip(encoder, trace[:-1], strict=True))):
        relevance = RULES[type(layer)](layer, x, relevance, eps)
    return relevance


# -- whole explanations ----------------------------------------------------------------------------


def explain(model, image, caption, eps=0.01, head=None):
    """Explains every word caption[t+1] at its step t, for one image or one set of regions.

    image (3,H,W), or (K,C), rows of zeros being padding. Returns arrays: logits (T,V), words (T,T),
    features (T,K,C), attention (T,K) or (T,M,K), pixels."""
    p = parameters(model)
    caption = caption.tolist()
    trace = None
    rows = image.double().numpy()
    if model.encoder is not None:
        trace = encoder_forward(model.encoder, rows)
        rows = trace[-1].reshape(len(trace[-1]), -1).T
    regions = [k for k in range(len(rows)) if trace is not None or any(rows[k] != 0)]
    f = [rows[k].tolist() for k in regions]
    length = sum(token != 0 for token in caption[1:])
    heads = getattr(model, "num_head", None)
    if heads:
        run = aoa_forward(p, f, caption[:length], heads)
    else:
        run = gridtd_forward(p, f, caption[:length], model.query_per_region, regions)
    T = len(caption) - 1
    shape = (heads, len(rows)) if heads else (len(rows),)
    result = {"logits": np.zeros((T, len(p["W_o"]))), "words": np.zeros((T, T)),
              "features": np.zeros((T, *rows.shape)), "attention": np.zeros((T, *shape)),
              "pixels": None if trace is None else np.zeros((T, *image.shape))}
    for t in range(length):
        word = caption[t + 1]
        if heads:
            r_words, r_f = aoa_backward(p, f, run, t, word, heads, head, eps)
        else:
            r_words, r_f = gridtd_backward(p, f, run, t, word, eps)
        result["logits"][t] = run["steps"][t]["logits"]
        result["words"][t, :t + 1] = [sum(r) for r in r_words]
        result["features"][t, regions] = r_f
        result["attention"][t][..., regions] = run["steps"][t]["alpha"]
        if trace is not None:
            relevance = result["features"][t].T.reshape(trace[-1].shape)
            result["pixels"][t] = encoder_rule(model.encoder, trace, relevance, eps)
    return result
