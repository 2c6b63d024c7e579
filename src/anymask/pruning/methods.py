"""The table of mask methods: criterion x rounds x scope x pattern x needs."""

from dataclasses import dataclass, replace

from anymask.errors import SettingError
from anymask.pruning import criteria
from anymask.pruning.criteria import Criterion
from anymask.pruning.patterns import PATTERNS
from anymask.pruning.patterns import pattern as pattern_of
from anymask.pruning.selector import SCOPES
from anymask.registry import lookup


@dataclass(frozen=True)
class Method:
    """One way to make a mask.

    Args:
        name: what `anymask.prune` takes.
        about: one line for `anymask list`.
        criterion: gives the scores, higher = keep.
        paper: arXiv id.
        scope: where scores compete: "global", or within each layer, whose share is "uniform", "er", "erk" or "balanced".
        pattern: how kept weights may lie: "unstructured", "N:M", "RxC", "channel" or "fan-in".
        rounds: score and prune this often, the density falling exponentially; None: as many as the rate of pruning needs.
        regrow: whether a round may bring back what an earlier one pruned.
        batches: how many batches of the data it looks at unless told otherwise.
        needs: among "data" (labelled batches), "example" (an input's shape, also taken from data), "train" (a function),
            "rewind_step" (a number of steps).
        rewinds: for those that train, whether each round starts from earlier weights again, or keeps what it trained.
    """

    name: str
    about: str
    criterion: Criterion
    paper: str
    scope: str = "global"
    pattern: str = "unstructured"
    rounds: int | None = 1
    regrow: bool = False
    batches: int = 1
    needs: frozenset[str] = frozenset()
    rewinds: bool = True


_DATA, _TRAIN = frozenset({"data"}), frozenset({"train"})

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("random", "random weights, layer densities by ERK (= random-erk)", criteria.random, "1911.11134", scope="erk"),
        Method("random-uniform", "random weights, the same density in every layer", criteria.random, "2202.02643", scope="uniform"),
        Method("random-er", "random weights, layer densities by Erdos-Renyi", criteria.random, "1707.04780", scope="er"),
        Method("random-erk", "random weights, layer densities by Erdos-Renyi with kernels", criteria.random, "1911.11134", scope="erk"),
        Method("random-balanced", "random weights, equally many in every layer", criteria.random, "2210.02412", scope="balanced"),
        Method("magnitude", "the largest weights as they are now", criteria.magnitude, "1506.02626"),
        Method("snip", "weights whose removal changes the loss most", criteria.snip, "1810.02340", needs=_DATA),
        # rounds: those of the authors' command lines, github.com/naver/force
        Method("snip-iterative", "snip in 60 rounds, scored anew on what is left", criteria.snip, "2006.09081", rounds=60, needs=_DATA),
        Method(
            "force", "snip in 60 rounds; pruned weights may come back", criteria.snip, "2006.09081", rounds=60, regrow=True, needs=_DATA
        ),
        # 8 batches of 128: the 10 images a class of CIFAR-100 of the paper
        Method("grasp", "weights that carry the gradient flow", criteria.grasp, "2002.07376", batches=8, needs=_DATA),
        Method("synflow", "weights on strong paths; no data", criteria.synflow, "2006.05467", rounds=100, needs=frozenset({"example"})),
        Method("taylor", "weights whose removal changes each batch's loss most", criteria.taylor, "1906.10771", batches=8, needs=_DATA),
        Method(
            "wanda",
            "large weights on large inputs, as many for each output",
            criteria.wanda,
            "2306.11695",
            scope="uniform",
            pattern="fan-in",
            needs=_DATA,
        ),
        Method(
            "lottery",
            "the largest weights after training, 20% fewer each round, rewound to the start",
            criteria.magnitude,
            "1803.03635",
            rounds=None,
            needs=_TRAIN,
        ),
        Method("lottery-oneshot", "the largest weights after one training, rewound", criteria.magnitude, "1803.03635", needs=_TRAIN),
        Method(
            "lottery-rewind",
            "lottery, rewound to the weights of an early step",
            criteria.magnitude,
            "1903.01611",
            rounds=None,
            needs=frozenset({"train", "rewind_step"}),
        ),
        Method(
            "lottery-lr",
            "lottery that keeps what it trained: the learning rate alone is rewound",
            criteria.magnitude,
            "2003.02389",
            rounds=None,
            needs=_TRAIN,
            rewinds=False,
        ),
    )
}


def is_method(name: str) -> bool:
    """Whether `name` stands for a row, as `method_of` takes it."""
    try:
        method_of(name)
    except SettingError:
        return False
    return True


def method_of(name: str | Method, *, scope: str | None = None, pattern: str | None = None) -> Method:
    """The row that `name` stands for: one of `METHODS`, with another scope or pattern after a plus sign; or a row of your own.

    Args:
        scope, pattern: what is given beside the name, and may not be other than in it.

    Raises:
        UnknownName: with the nearest names.
        SettingError: for a pattern out of range, or two scopes or patterns.

    Example:
        >>> row = method_of("snip+erk+2:4")
        >>> row.name, row.scope, row.pattern
        ('snip', 'erk', '2:4')
    """
    if isinstance(name, Method):
        return name
    base, *words = name.split("+")
    row = lookup(METHODS, base, what="mask method")
    scopes = [word for word in words if word in SCOPES]
    patterns = [word for word in words if word not in SCOPES]
    for what, given, inside in (("scope", scope, scopes), ("pattern", pattern, patterns)):
        if given is not None and inside and inside != [given]:
            raise SettingError(f"{what} came as {given!r} with {name}", allowed="one of the two", fix=f"write {base}+{given}")
    if len(scopes) > 1 or len(patterns) > 1:
        raise SettingError(
            f"mask method came as {name!r}",
            allowed=f"at most one scope ({', '.join(SCOPES)}) and one pattern ({', '.join(PATTERNS)})",
            fix=f"write {base}+erk+2:4, for example",
        )
    for word in patterns:
        pattern_of(word)
    return replace(row, scope=[row.scope, *scopes][-1], pattern=[row.pattern, *patterns][-1])
