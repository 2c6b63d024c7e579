"""The methods' formulas a second time: NumPy, float64, loops. No line of the package, and none of torch, is used here.

A network is a list of `Layer`; scores and masks are name -> array. Gradients are back-propagation written out layer by layer.
H g is the complex step Im(gradient(w + i h g)) / h, which has no rounding error of its own (Squire and Trapp 1998,
doi 10.1137/S003614459631241X): every step below also works on complex numbers.
"""

from dataclasses import dataclass, replace

import numpy as np

STEP = 1e-30


@dataclass(frozen=True, eq=False)
class Layer:
    """kind: linear, conv, norm (batch norm), relu or flatten; only linear and conv have a name and are pruned."""

    kind: str
    name: str = ""
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    eps: float = 0.0
    mean: np.ndarray | None = None
    variance: np.ndarray | None = None


def weights_of(net):
    return {layer.name: layer.weight for layer in net if layer.name}


def with_weights(net, weights):
    return [replace(layer, weight=weights[layer.name]) if layer.name else layer for layer in net]


def masked(net, mask):
    return with_weights(net, {name: weight * mask[name] for name, weight in weights_of(net).items()})


# -- forward ------------------------------------------------------------------------------------------------------------
def places(layer, height, width):
    """Of a padded image: for each output position the rows and columns that the kernel looks at."""
    (kh, kw), (dh, dw), (sh, sw) = layer.weight.shape[2:], layer.dilation, layer.stride
    tops = range(0, height - dh * (kh - 1), sh)
    lefts = range(0, width - dw * (kw - 1), sw)
    return [[(slice(t, t + dh * (kh - 1) + 1, dh), slice(a, a + dw * (kw - 1) + 1, dw)) for a in lefts] for t in tops]


def pad(x, layer):
    (top, left), (n, c, h, w) = layer.padding, x.shape
    padded = np.zeros((n, c, h + 2 * top, w + 2 * left), dtype=x.dtype)
    padded[:, :, top : top + h, left : left + w] = x
    return padded


def patches(x, layer):
    """What the kernel sees: `(images, groups, positions, inputs of a group * kernel)`, and the positions as rows and columns."""
    padded = pad(x, layer)
    grid = places(layer, *padded.shape[2:])
    pieces = [padded[:, :, rows, columns].reshape(len(x), layer.groups, -1) for line in grid for rows, columns in line]
    return np.stack(pieces, axis=2), (len(grid), len(grid[0]))


def by_group(layer):
    """A convolution's weight as `(groups, outputs of a group, inputs of a group * kernel)`."""
    return layer.weight.reshape(layer.groups, len(layer.weight) // layer.groups, -1)


def channels(vector, x):
    return vector.reshape(1, -1, *[1] * (x.ndim - 2))


def statistics(layer, x, train):
    axes = (0, *range(2, x.ndim))
    if not train:
        return layer.mean, layer.variance
    mean = x.mean(axes)
    return mean, ((x - channels(mean, x)) ** 2).mean(axes)


def apply(layer, x, train):
    if layer.kind == "linear":
        y = x @ layer.weight.T
    elif layer.kind == "conv":
        seen, (rows, columns) = patches(x, layer)
        y = np.einsum("ngpk,gok->ngop", seen, by_group(layer)).reshape(len(x), -1, rows, columns)
    elif layer.kind == "norm":
        mean, variance = statistics(layer, x, train)
        y = channels(layer.weight, x) * (x - channels(mean, x)) / np.sqrt(channels(variance, x) + layer.eps)
    elif layer.kind == "relu":
        y = x * (x.real > 0)
    else:
        y = x.reshape(len(x), -1)
    return y if layer.bias is None else y + channels(layer.bias, y)


def forward(net, x, train=True):
    """What goes into each layer, and the output of the last one."""
    seen = [x]
    for layer in net:
        seen.append(apply(layer, seen[-1], train))
    return seen


# -- backward -----------------------------------------------------------------------------------------------------------
def softmax_error(logits, y, temperature=1.0):
    """d/d logits of the mean cross-entropy of logits / temperature."""
    z = np.exp((logits - logits.real.max(axis=1, keepdims=True)) / temperature)
    error = z / z.sum(axis=1, keepdims=True)
    for row, label in enumerate(y):
        error[row, label] -= 1
    return error / temperature / len(y)


def conv_back(layer, x, back):
    seen, _ = patches(x, layer)
    back = back.reshape(len(x), layer.groups, back.shape[1] // layer.groups, -1)
    gradient = np.einsum("ngop,ngpk->gok", back, seen).reshape(layer.weight.shape)
    spread = np.einsum("ngop,gok->ngpk", back, by_group(layer))
    padded = np.zeros(pad(x, layer).shape, dtype=spread.dtype)
    flat = [place for line in places(layer, *padded.shape[2:]) for place in line]
    for number, (rows, columns) in enumerate(flat):
        padded[:, :, rows, columns] += spread[:, :, number].reshape(len(x), x.shape[1], *layer.weight.shape[2:])
    (top, left), (h, w) = layer.padding, x.shape[2:]
    return gradient, padded[:, :, top : top + h, left : left + w]


def norm_back(layer, x, back):
    """Through the statistics of the batch, too."""
    mean, variance = statistics(layer, x, True)
    axes = (0, *range(2, x.ndim))
    deviation = np.sqrt(channels(variance, x) + layer.eps)
    centred = (x - channels(mean, x)) / deviation
    back = back * channels(layer.weight, x)
    along = channels((back * centred).mean(axes), x)
    return (back - channels(back.mean(axes), x) - centred * along) / deviation


def gradients(net, x, y, temperature=1.0):
    """dL/dw of every named layer; L is the mean cross-entropy of one batch, batch norm uses the batch."""
    seen, found = forward(net, x), {}
    back = softmax_error(seen[-1], y, temperature)
    for layer, before in zip(reversed(net), reversed(seen[:-1]), strict=True):
        if layer.kind == "linear":
            found[layer.name], back = back.T @ before, back @ layer.weight
        elif layer.kind == "conv":
            found[layer.name], back = conv_back(layer, before, back)
        elif layer.kind == "norm":
            back = norm_back(layer, before, back)
        elif layer.kind == "relu":
            back = back * (before.real > 0)
        else:
            back = back.reshape(before.shape)
    return found


def hessian_times(net, direction, x, y, temperature=1.0):
    moved = {name: weight + 1j * STEP * direction[name] for name, weight in weights_of(net).items()}
    return {name: g.imag / STEP for name, g in gradients(with_weights(net, moved), x, y, temperature).items()}


def total(parts):
    """The sum of dictionaries of arrays, key by key."""
    parts = list(parts)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


# -- scores -------------------------------------------------------------------------------------------------------------
def magnitude(net, pairs):
    return {name: abs(weight) for name, weight in weights_of(net).items()}


def snip(net, pairs):
    """|w * dL/dw|, L the mean over the batches (arXiv 1810.02340)."""
    slope = total(gradients(net, x, y) for x, y in pairs)
    return {name: abs(weight * slope[name]) for name, weight in weights_of(net).items()}


def grasp(net, pairs):
    """w * (H g), g and H of the loss with a temperature of 200: the paper's S(-w) = -w * (H g), turned (arXiv 2002.07376)."""
    slope = total(gradients(net, x, y, 200.0) for x, y in pairs)
    bent = total(hessian_times(net, slope, x, y, 200.0) for x, y in pairs)
    return {name: weight * bent[name] for name, weight in weights_of(net).items()}


def taylor(net, pairs):
    """The mean over batches of (w * g)^2, g the batch's gradient (arXiv 1906.10771)."""
    squares = [{name: (net_w * g[name]) ** 2 for name, net_w in weights_of(net).items()} for g in (gradients(net, x, y) for x, y in pairs)]
    return {name: sum_ / len(pairs) for name, sum_ in total(squares).items()}


def wanda(net, pairs):
    """|w_ij| * ||x_j||, the norm over all images, and all positions of a convolution; statistics of training (arXiv 2306.11695)."""
    squares = {layer.name: 0.0 for layer in net if layer.name}
    for x, _ in pairs:
        for layer, before in zip(net, forward(net, x, train=False), strict=False):
            if layer.kind == "linear":
                squares[layer.name] = squares[layer.name] + (before.reshape(-1, before.shape[-1]) ** 2).sum(0)
            elif layer.kind == "conv":
                seen, _ = patches(before, layer)
                each = (seen**2).sum((0, 2))  # (groups, inputs of a group * kernel)
                per_output = np.repeat(each, len(layer.weight) // layer.groups, axis=0)
                squares[layer.name] = squares[layer.name] + per_output.reshape(layer.weight.shape)
    return {name: abs(weight) * np.sqrt(squares[name]) for name, weight in weights_of(net).items()}


# -- SynFlow: a convolution is a matrix in which a weight occurs at many places; scores are sums over paths --------------------
def edges(layer, shape):
    """(output unit, input unit, flat number of the weight) of every multiplication of a layer, and the shape that comes out."""
    if layer.kind == "linear":
        outputs, inputs = layer.weight.shape
        return [(o, i, o * inputs + i) for o in range(outputs) for i in range(inputs)], (outputs,)
    numbers = np.arange(np.prod(shape)).reshape(1, *shape) + 1  # 0 is the padding
    seen, (rows, columns) = patches(numbers, layer)
    outputs, size = len(layer.weight), layer.weight[0].size
    found = []
    for o in range(outputs):
        for place, inputs in enumerate(seen[0, o * layer.groups // outputs]):
            found += [(o * rows * columns + place, i - 1, o * size + k) for k, i in enumerate(inputs) if i]
    return found, (outputs, rows, columns)


def as_graph(net, shape):
    """For each layer that multiplies: name, edges as three arrays, and what is added to each output unit; norm at mean 0, variance 1."""
    graph = []
    for layer in net:
        if layer.kind in {"linear", "conv"}:
            found, shape = edges(layer, shape)
        elif layer.kind == "norm":
            each = int(np.prod(shape[1:]))
            found = [(unit, unit, unit // each) for unit in range(int(np.prod(shape)))]
        else:
            shape = (int(np.prod(shape)),) if layer.kind == "flatten" else shape
            continue
        out, into, number = np.array(found).T
        units = int(np.prod(shape))
        constant = np.zeros(units) if layer.bias is None else np.repeat(abs(layer.bias), units // len(layer.bias))
        graph.append((layer.name, out, into, number, constant))
    return graph


def synflow(net, graph, shape):
    """The share of all flow from ones through |w| to any output that runs through each weight (arXiv 2006.05467)."""
    sizes = [layer for layer in net if layer.kind in {"linear", "conv", "norm"}]
    value = [abs(s.weight).reshape(-1) / (np.sqrt(1 + s.eps) if s.kind == "norm" else 1) for s in sizes]
    into_unit = [np.ones(int(np.prod(shape)))]
    for (_, out, into, number, constant), w in zip(graph, value, strict=True):
        arriving = np.bincount(out, weights=w[number] * into_unit[-1][into], minlength=len(constant))
        into_unit.append(arriving + constant)
    out_of_unit, scores = np.ones(len(into_unit[-1])), {}
    for (name, out, into, number, _), w, reached in zip(reversed(graph), reversed(value), reversed(into_unit[:-1]), strict=True):
        if name:
            paths = np.bincount(number, weights=reached[into] * out_of_unit[out], minlength=len(w))
            scores[name] = w * paths / into_unit[-1].sum()
        out_of_unit = np.bincount(into, weights=w[number] * out_of_unit[out], minlength=len(reached))
    return {name: scores[name].reshape(weight.shape) for name, weight in weights_of(net).items()}
