"""From scores to masks a second time: counts, rounds, distributions, patterns and lottery tickets, in NumPy and loops."""

import math

import numpy as np

from tests.reference.formulas import gradients, masked, total, weights_of, with_weights

GAP = 1e-10  # scores nearer than this, relative to the larger, may be equal but for rounding


class Tie(Exception):
    """Equal scores at the threshold: the formula does not say which of them stay. Until then: `left` weights after `rounds` rounds."""

    def __init__(self, rounds=0, left=0):
        self.rounds, self.left = rounds, left


def best(scores, count):
    """The `count` highest of all scores together.

    Raises:
        Tie: when the lowest that stays equals the highest that goes.
    """
    order = np.sort(np.concatenate([score.reshape(-1) for score in scores.values()]))[::-1]
    if count == len(order):
        return {name: np.ones(score.shape, bool) for name, score in scores.items()}
    stays, goes = order[count - 1], order[count]
    if stays - goes <= GAP * abs(stays):
        raise Tie
    return {name: score >= stays for name, score in scores.items()}


def best_by_layer(scores, counts):
    return {name: best({name: score}, counts[name])[name] for name, score in scores.items()}


def ones(net):
    return {name: np.ones(weight.shape, bool) for name, weight in weights_of(net).items()}


def in_rounds(net, count, rounds, score, *, regrow=False):
    """Score the masked network, keep size * (count / size) ** (r / rounds), again; what is pruned stays pruned unless `regrow`."""
    mask = ones(net)
    size = left = sum(kept.size for kept in mask.values())
    for number in range(1, rounds + 1):
        scores = score(masked(net, mask))
        if not regrow:
            scores = {name: np.where(mask[name], s, -1e300) for name, s in scores.items()}
        before, left = left, round(size * (count / size) ** (number / rounds))
        try:
            mask = best(scores, left)
        except Tie as tie:
            raise Tie(number - 1, before) from tie
    return mask


def force(net, pairs):
    """|w * g(masked w)| over all weights w of the whole network, the pruned ones too (arXiv 2006.09081)."""

    def score(cut):
        slope = total(gradients(cut, x, y) for x, y in pairs)
        return {name: abs(weight * slope[name]) for name, weight in weights_of(net).items()}

    return score


# -- how many a layer keeps -----------------------------------------------------------------------------------------------
SHARE = {
    "uniform": math.prod,
    "er": lambda shape: (shape[0] + shape[1]) * math.prod(shape[2:]),
    "erk": sum,
    "balanced": lambda shape: 1,
}


def wanted_by_bisection(shapes, count, distribution):
    """Not rounded: min(size, eps * share) of each layer, eps by bisection so that the sum is `count`."""
    share = {name: SHARE[distribution](shape) for name, shape in shapes.items()}
    low, high = 0.0, float(sum(map(math.prod, shapes.values())))
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(math.prod(shape), middle * share[name]) for name, shape in shapes.items())
        low, high = (middle, high) if kept < count else (low, middle)
    return {name: min(float(math.prod(shape)), high * share[name]) for name, shape in shapes.items()}


def whole(wanted, count, steps):
    """Rounded down to multiples of `steps`, then the largest remainders up as long as `count` is not passed."""
    counts = {name: int(value / steps[name] + 1e-9) * steps[name] for name, value in wanted.items()}
    remainder = {name: round((wanted[name] - counts[name]) / steps[name], 9) for name in wanted}  # equal ones: the earlier layer
    for name in sorted(wanted, key=lambda name: -remainder[name]):
        if remainder[name] and sum(counts.values()) + steps[name] <= count:
            counts[name] += steps[name]
    return counts


def layer_counts(shapes, count, distribution):
    return whole(wanted_by_bisection(shapes, count, distribution), count, dict.fromkeys(shapes, 1))


# -- patterns -------------------------------------------------------------------------------------------------------------
def flat(array):
    """`(outputs, inputs, places of the kernel)`, sharing the array's memory."""
    return array.reshape(*array.shape[:2], -1)


def n_of_m(scores, n, m):
    """n of every m consecutive inputs, at one place of the kernel."""
    mask = {name: np.zeros(score.shape, bool) for name, score in scores.items()}
    for name, score in scores.items():
        outputs, inputs, places = flat(score).shape
        for o, first, k in np.ndindex(outputs, inputs // m, places):
            window = flat(score)[o, first * m : (first + 1) * m, k]
            flat(mask[name])[o, first * m + np.argsort(window)[-n:], k] = True
    return mask


def equal_fan_in(scores, counts):
    """Each output keeps the best counts[name] / outputs of its weights."""
    mask = {name: np.zeros(score.shape, bool) for name, score in scores.items()}
    for name, score in scores.items():
        each = counts[name] // len(score)
        for row, kept in zip(score.reshape(len(score), -1), mask[name].reshape(len(score), -1), strict=True):
            kept[:] = best({name: row}, each)[name] if each else False
    return mask


def whole_units(scores, count, rows, columns=None):
    """Blocks of rows outputs x columns inputs at one place of the kernel, or whole outputs: highest mean first, as long as they fit."""
    units = []
    for name, score in scores.items():
        outputs, inputs, places = flat(score).shape
        wide, deep = (columns, 1) if columns else (inputs, places)
        for o, i, k in np.ndindex(-(-outputs // rows), -(-inputs // wide), places // deep):
            block = np.s_[o * rows : (o + 1) * rows, i * wide : (i + 1) * wide, k * deep : (k + 1) * deep]
            units.append((flat(score)[block].mean(), flat(score)[block].size, name, block))
    mask = {name: np.zeros(score.shape, bool) for name, score in scores.items()}
    for _, size, name, block in sorted(units, key=lambda unit: -unit[0]):
        if size <= count:
            flat(mask[name])[block] = True
            count -= size
    return mask


# -- lottery tickets --------------------------------------------------------------------------------------------------------
def descend(net, batches, *, rate, steps, mask):
    """Plain gradient descent: w <- (w - rate(step) * g) * mask, batch by batch in their order."""
    for step in range(*steps):
        x, y = batches[step % len(batches)]
        slope = gradients(net, x, y)
        net = with_weights(net, {name: (weight - rate(step) * slope[name]) * mask[name] for name, weight in weights_of(net).items()})
    return net


def lottery(net, count, train, *, rewind_step=0, one_shot=False, keep_weights=False, share=0.2):
    """Train, prune the smallest of what is left, go back to step k (or keep the weights), again (arXiv 1803.03635, 2003.02389).

    `train(net, mask, first, last)` gives the network after the steps from `first` to before `last` (None: the end).
    """
    mask = ones(net)
    size = left = sum(kept.size for kept in mask.values())
    start = current = train(net, mask, 0, rewind_step) if rewind_step else net
    rounds = 0
    while left > count:
        rounds += 1
        trained = train(masked(current, mask), mask, rewind_step, None)
        left = count if one_shot else max(count, round(size * (1 - share) ** rounds))
        scores = {name: np.where(mask[name], abs(weight), -1.0) for name, weight in weights_of(trained).items()}
        mask = best(scores, left)
        current = trained if keep_weights else start
    return mask
