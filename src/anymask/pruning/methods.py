"""The table of mask methods: criterion x rounds x scope x needs."""

from dataclasses import dataclass

from anymask.pruning import criteria
from anymask.pruning.criteria import Criterion


@dataclass(frozen=True)
class Method:
    """One way to make a mask.

    Args:
        name: what `anymask.prune` takes.
        about: one line for `anymask list`.
        criterion: gives the scores, higher = keep.
        paper: arXiv id.
        scope: where scores compete: "global", or within each layer, whose share is "uniform", "er" or "erk".
        rounds: score and prune this often, the density falling exponentially; None: as many as the rate of pruning needs.
        batches: how many batches of the data it looks at unless told otherwise.
        needs: among "data" (labelled batches), "example" (an input's shape, also taken from data), "train" (a function).
    """

    name: str
    about: str
    criterion: Criterion
    paper: str
    scope: str = "global"
    rounds: int | None = 1
    batches: int = 1
    needs: frozenset[str] = frozenset()


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("random", "random weights, layer densities by ERK (= random-erk)", criteria.random, "1911.11134", scope="erk"),
        Method("random-uniform", "random weights, the same density in every layer", criteria.random, "2202.02643", scope="uniform"),
        Method("random-er", "random weights, layer densities by Erdos-Renyi", criteria.random, "1707.04780", scope="er"),
        Method("random-erk", "random weights, layer densities by Erdos-Renyi with kernels", criteria.random, "1911.11134", scope="erk"),
        Method("magnitude", "the largest weights as they are now", criteria.magnitude, "1506.02626"),
        Method("snip", "weights whose removal changes the loss most", criteria.snip, "1810.02340", needs=frozenset({"data"})),
        # 8 batches of 128: the 10 images a class of CIFAR-100 of the paper
        Method("grasp", "weights that carry the gradient flow", criteria.grasp, "2002.07376", batches=8, needs=frozenset({"data"})),
        Method("synflow", "weights on strong paths; no data", criteria.synflow, "2006.05467", rounds=100, needs=frozenset({"example"})),
        Method(
            "lottery",
            "the largest weights after training, 20% fewer each round, rewound",
            criteria.magnitude,
            "1803.03635",
            rounds=None,
            needs=frozenset({"train"}),
        ),
    )
}
