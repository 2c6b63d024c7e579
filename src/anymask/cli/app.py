"""The table of commands, with the help and the examples of each."""

from dataclasses import dataclass
from typing import Any

from cyclopts import App, Parameter

import anymask
from anymask.cli.settings import check_out, check_whole_numbers, expand_home, read_config, split_commas


@dataclass(frozen=True)
class Command:
    """One command; `target` is imported when the command is used, because most of them need torch."""

    target: str
    about: str
    more: str


COMMANDS: dict[str, Command] = {
    "compare": Command(
        "anymask.cli.compare:compare",
        "Train the same sparse networks with each recipe, paired by seed, and say what a recipe brings.",
        """\
Every mask is made on the dense initialisation of a seed. Each recipe then
trains that same network: same initialisation, mask, split, order of the data.
Ctrl-C keeps what is finished; the same command goes on from there.

Examples:

  # Embedded images, three masks, three seeds: table and page in runs/compare
  anymask compare

  # A mask that stays and one that moves every 25 steps, at two sparsities;
  # --dry-run only shows what it would train
  anymask compare --masks snip rigl+25it --sparsity 0.95 0.98 --dry-run

  # With GraSP and the lottery ticket, whose rounds take longer: each prunes 20%
  # of what is left, so that a ticket costs about log(1 - sparsity) / log(0.8)
  # trainings for each seed, 18 of them at sparsity 0.98.
  anymask compare --masks random-erk snip synflow grasp lottery --out runs/all

  # Which technique does it? One alone, and all but one, against the default
  anymask compare --masks snip --recipes default tost:lrsi tost:-lrsi tost

  # Settings from a file with lines such as `epochs = 20`, one of them changed
  anymask compare --config my.toml --seeds 5 --out runs/mine
""",
    ),
    "sweep": Command(
        "anymask.cli.sweep:sweep",
        "Train a plan of many networks in its order, each once, whatever stops it.",
        """\
A plan is a TOML file, the most urgent block first:

  [protocol]
  epochs = 15
  [[block]]
  model = ["resnet20", "vgg11-0.25x"]
  masks = ["random-erk", "snip"]
  sparsity = [0.98, 0.95]
  recipes = ["default", "best"]
  seeds = 3

Finished trainings are in OUT/ledger.jsonl and never run again; one that was
stopped or killed goes on from its last epoch; one that failed is tried again
at the end, then listed with its reason. Several processes may work on one OUT,
also from different shells. --dry-run only shows what would run.

Examples:

  anymask sweep plan.toml --out runs/plan

  # Stop in time and say what is left; the same command goes on from there
  anymask sweep plan.toml --out runs/plan --budget 25m

  # Four processes, which share the cores
  anymask sweep plan.toml --out runs/plan --workers 4

  # Four trainings in one process, on a GPU that a small network does not fill
  anymask sweep plan.toml --out runs/plan --compile graph --streams 4

  # A core of a Ray cluster for each training (with a GPU for --device cuda)
  anymask sweep plan.toml --out runs/plan --ray 10.0.0.1:6379
""",
    ),
    "study": Command(
        "anymask.cli.study:study",
        "Search a recipe's settings on tuning data, and confirm what wins on untouched seeds and data.",
        """\
A study is a TOML file; docs/study.md has one that is whole:

  [tune]                      # seeds and images that the search may see
  first_seed = 100
  trials = 20
  share = 0.5                 # of the images, where both halves have the same
  [confirm]                   # what the winner is judged on, once
  seeds = 5
  [space]
  lr = [0.05, 0.1, 0.2]       # tuned for the default recipe, too
  "label_smoothing.eps" = [0.0, 0.2]

The winner is OUT/winner.toml, a recipe file; OUT/study.md says which numbers
chose it and which confirm it. What was stopped or killed goes on from there.

Examples:

  anymask study study.toml --out runs/study

  # Stop in time; the same command goes on
  anymask study study.toml --out runs/study --budget 25m

  # The winner, in a training of its own
  anymask train --mask snip --recipe runs/study/winner.toml --out runs/best
""",
    ),
    "report": Command(
        "anymask.cli.report:report",
        "Turn ledgers into tables of paired differences, and a page.",
        """\
All rows are put together; of rows with the same id the last one counts. First
comes what failed, if anything did, then every cell, with what is won, tied and
lost, then the effect against sparsity, then a table for each data set and
network.

Examples:

  anymask report runs/plan

  # Several ledgers together, in runs/all/table.md and runs/all/report.html
  anymask report runs/plan runs/other/ledger.jsonl --out runs/all
""",
    ),
    "train": Command(
        "anymask.cli.train:train",
        "Train one sparse network, and keep its weights.",
        """\
OUT then holds model.safetensors (the plain network, at the checkpoint chosen
on validation data), mask.mask and ledger.jsonl. A training that was stopped
goes on with --resume, to the same numbers bit for bit.

Examples:

  anymask train --mask snip --sparsity 0.98 --out runs/snip

  # A mask of your own: a file of mask.save(path)
  anymask train --mask my.mask --recipe default --seed 1 --out runs/mine

  # Go on after Ctrl-C or a power cut
  anymask train --mask snip --sparsity 0.98 --out runs/snip --resume

  # One training on four GPUs (docs/integrations.md); compare can do so, too
  torchrun --nproc-per-node 4 -m anymask train --mask snip --out runs/four

  # The dense network, of another kind, on CIFAR-100
  anymask train --mask dense --data cifar100 --data-dir data \\
    --model resnet32-2x --epochs 160 --out runs/dense
""",
    ),
    "prune": Command(
        "anymask.cli.prune:prune",
        "Make a mask on the initialisation of a seed, or a trained network, and save it.",
        """\
Examples:

  anymask prune synflow --sparsity 0.98 --out synflow.mask

  # On another network and other images
  anymask prune snip --sparsity 0.9 --data cifar10 --data-dir data \\
    --model resnet20 --seed 1 --out snip.mask

  # Another scope, and whole channels, in each layer at least ten weights
  anymask prune magnitude --scope erk --pattern channel --sparsity 0.9 \\
    --floor 10 --out channels.mask

  # A trained network, pruned, and mended without training it
  anymask prune magnitude --sparsity 0.8 --data cifar100 --data-dir data \\
    --model resnet32-2x --weights runs/dense/model.safetensors \\
    --out dense.mask --refit mended.safetensors

  # Which methods there are
  anymask list masks
""",
    ),
    "inspect": Command(
        "anymask.cli.inspect:inspect",
        "Show what masks keep, cut off and have in common, or what is in a run folder.",
        """\
Examples:

  # Density of each layer
  anymask inspect synflow.mask

  # How much two masks overlap, and pictures of it in synflow.html
  anymask inspect synflow.mask snip.mask --page

  # A mask of another library; which weights no path passes needs its network
  anymask inspect my.mask --model resnet20 --input 3 32 32

  # The table of what is finished; --page writes table.md and report.html again
  anymask inspect runs/compare --page
""",
    ),
    "convert": Command(
        "anymask.cli.convert:convert",
        "Read a mask of another library, and write it for this one or another.",
        """\
What a file is, is told by what is in it; docs/formats.md lists the libraries.
A name for OUT that ends in .safetensors gives safetensors, any other a file of
torch.save; our own format is safetensors under any name.

Examples:

  # The masks in a checkpoint, or its zeros, as a mask file of ours
  anymask convert pruned.pth my.mask

  # For torch.nn.utils.prune: the mask with the weights of a checkpoint
  anymask convert synflow.mask pruned.pt --to torch-prune --weights dense.pt

  # A checkpoint with the pruned weights at 0
  anymask convert synflow.mask sparse.safetensors --to zeros --weights dense.pt
""",
    ),
    "ship": Command(
        "anymask.cli.ship:ship",
        "Write a trained network to a file of the size of what is kept.",
        """\
x.anymask holds the kept weights alone, with batch norms folded in, and is run
by anymask.load with NumPy; x.onnx is dense, x.safetensors the state dict.
Images go into each of them as they went into the network: normalised.

Examples:

  anymask train --mask snip --sparsity 0.98 --out runs/snip
  anymask ship runs/snip --to small.anymask

  # One byte a value, and a little more than one for where it is
  anymask ship runs/snip --to small.anymask --values int8

  # A checkpoint of your own; the zeros of its weights are what is left out
  anymask ship net.pt --model resnet18 --input 3 32 32 --to net.onnx
""",
    ),
    "bench": Command(
        "anymask.cli.bench:bench",
        "Time a shipped network here, beside PyTorch and ONNX Runtime.",
        """\
Random images go through each in turns. A batch for which ours is slower is said
as plainly as one for which it is faster. int8 is calibrated on random images,
too: its time counts here, and not its accuracy.

Examples:

  anymask bench small.anymask

  # One image at a time on one thread, all numbers in a file
  anymask bench small.anymask --batch 1 --threads 1 --json small.json

  # Without torch.compile, which takes a while
  anymask bench small.anymask --against eager channels-last onnx
""",
    ),
    "list": Command(
        "anymask.cli.listing:show",
        "Show the names that other commands take: masks, recipes, techniques, models, data, protocols.",
        """\
Examples:

  anymask list

  anymask list masks
""",
    ),
}

_MORE = """\
Start with:

  anymask compare            # the main job, on images that come with it
  anymask compare --help     # every setting, with examples
  anymask list               # the names that can be given
"""


def make_app() -> App:
    """The command line as a cyclopts App."""
    app = App(
        name="anymask",
        help="Bring any mask, train it better: training sparse neural networks.",
        help_epilogue=_MORE,
        help_format="plaintext",
        version=anymask.__version__,
        default_parameter=Parameter(consume_multiple=1, negative_iterable=(), show_default=_shown),
        config=[split_commas, read_config, expand_home, check_whole_numbers, check_out],
        suppress_keyboard_interrupt=False,  # `main` answers Ctrl-C, and commands say what is kept
        result_action="return_value",
    )
    for place, (name, command) in enumerate(COMMANDS.items()):
        app.command(command.target, name=name, help=command.about, help_epilogue=command.more, sort_key=place)
    return app


def _shown(value: Any) -> str | None:
    """A default value for people; None where there is nothing to say."""
    if value is None or value is False:
        return None
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
