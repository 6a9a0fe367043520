"""Image encoders: sequences of convolution, batch-norm, ReLU, pooling and residual blocks.

Each maps images (B, 3, S, S), normalised as in captioning.data.images, to features (B, C, h, w)
(docs/method.md, section 1).
"""
import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce

from captioning import processes
from captioning.errors import InputError
from captioning.weights import download_weights, read_weights

IMAGE_SIZE = {"vgg16": 224, "vgg19": 224, "resnet50": 224, "resnet101": 224, "small": 112}


class Residual(nn.Module):
    """A residual block, body(x) + shortcut(x)."""

    def __init__(self, body, shortcut):
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation of x (B, C, H, W) over the images of all processes.

    torch.nn.SyncBatchNorm does the same, but only on GPUs."""

    def forward(self, x):
        if processes.count() == 1 or not self.training:
            return super().forward(x)
        y = x.to(self.weight.dtype)         # mixed precision
        count = y.new_tensor([y.numel() / y.shape[1]])
        sums = all_reduce(torch.cat([y.sum((0, 2, 3)), count]))
        mean = sums[:-1] / sums[-1]
        n = sums[-1].detach()
        y = y - mean[:, None, None]
        variance = all_reduce((y * y).sum((0, 2, 3))) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (y * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def architecture(name):
    """The encoder `name`, one of IMAGE_SIZE, with random weights."""
    if name == "small":
        return _small()
    _check(name)
    return _plain_sequence(_torchvision(name))


def _torchvision(name):
    """torchvision's model with random weights, VGG without the 124 million of its classifier."""
    from torchvision import models
    if not name.startswith("vgg"):
        return models.get_model(name)

    model = nn.Module()
    model.features = models.vgg.make_layers(models.vgg.cfgs[{"vgg16": "D", "vgg19": "E"}[name]])
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def build(name, weights=None):
    """The encoder `name` with the weights of a file with torchvision's names, or torchvision's own.

    The encoder "small" is meant to be trained: without a file its weights are random. InputError if
    the weights cannot be downloaded or read, or belong to another encoder.
    """
    _check(name)
    if name == "small":
        encoder = _small()
        if weights is not None:
            _load(encoder, read_weights(weights), weights)
        return encoder
    model = _torchvision(name)
    state = read_weights(weights) if weights else download_weights(
        name, "IMAGENET1K_V1", "--encoder_weights")
    prefix = ("features.",) if name.startswith("vgg") else ("conv1.", "bn1.", "layer")
    _load(model, state, weights or name, prefix)
    return _plain_sequence(model)


def feature_dim(encoder):
    """Channels C of the encoder's output: those of its last convolution."""
    return [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)][-1].out_channels


def _check(name):
    if name not in IMAGE_SIZE:
        raise InputError(f"unknown encoder '{name}': choose one of {', '.join(IMAGE_SIZE)}")


def _load(model, state, source, prefix=("",)):
    """Loads `state` into all parameters and buffers of `model` whose names start with `prefix`."""
    loaded = {}
    for key, value in model.state_dict().items():
        # old files lack the counters of batch-norms
        if not key.startswith(prefix) or (key.endswith("num_batches_tracked") and key not in state):
            continue
        if key not in state:
            raise InputError(f"the encoder weights {source} lack '{key}': are they of another "
                             "encoder?")
        if state[key].shape != value.shape:
            raise InputError(f"the encoder weights {source} have {tuple(state[key].shape)} for "
                             f"'{key}' instead of {tuple(value.shape)}: are they of another "
                             "encoder?")
        loaded[key] = state[key].float()
    model.load_state_dict(loaded, strict=False)


def _plain_sequence(model):
    """torchvision's VGG without its last max-pool, or ResNet without its head, as a sequence."""
    if hasattr(model, "features"):
        layers = list(model.features)[:-1]
        return nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer
                               for layer in layers))
    model.eval()
    layers = [_fold(model.conv1, model.bn1), nn.ReLU(), model.maxpool]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            layers += _bottleneck(block)
    return nn.Sequential(*layers)


def _bottleneck(block):
    body = nn.Sequential(_fold(block.conv1, block.bn1), nn.ReLU(), _fold(block.conv2, block.bn2),
                         nn.ReLU(), _fold(block.conv3, block.bn3))
    shortcut = nn.Sequential(_fold(*block.downsample)) if block.downsample else nn.Sequential()
    return Residual(body, shortcut), nn.ReLU()


def _fold(conv, norm):
    """The convolution with the batch-norm after it, by its running statistics, folded into it."""
    with torch.no_grad():
        return nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())


def _small():
    """Five convolutions with batch-norm, fast on CPUs: 3×112×112 to 128×7×7.

    Their receptive field has 67 pixels."""
    layers = []
    width = 3
    for channels in (32, "pool", 64, 96, "pool", 128, 128, "pool"):
        if channels == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        kernel, stride = (3, 1) if layers else (5, 2)
        conv = nn.Conv2d(width, channels, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, BatchNorm(channels), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers)
