"""Studies: settings are searched on one half of seeds and data, and what was found is confirmed once on the other."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from anymask.errors import AnymaskError, FileFormatError, SettingError, TechniqueError
from anymask.report import failed_table, markdown, overviews, table
from anymask.runlog import Ledger, atomic, settings_id
from anymask.sweep.claims import claimed
from anymask.sweep.compare import Watcher
from anymask.sweep.halves import confirmation_cut, tuning_cut
from anymask.sweep.plan import Plan
from anymask.sweep.run import Benches, Clock, Outcome, Stopped, Worker, tasks
from anymask.sweep.space import base_changes, rounded, switched_off
from anymask.sweep.studyfile import Study
from anymask.sweep.tuning import Rate, Trial, Tuning, reason_of, tuning_table, where, with_recipes
from anymask.sweep.variants import variant_name
from anymask.sweep.winner import Winner, read_winner
from anymask.train import Computing

WINNER, TUNED, REPORT, STUDY = "winner.toml", "tune/table.md", "study.md", "study.json"
JOURNAL = "tune/journal.log"
RETRIES = 1  # of a training of the confirmation; in tuning a setting that fails once has failed


@dataclass(frozen=True)
class Studied:
    """How far a study is.

    Args:
        trials: how many settings have been tried.
        winner: None while the search goes on.
        confirmed: None before the confirmation.
    """

    trials: int
    winner: Winner | None = None
    confirmed: Outcome | None = None


def study(
    wanted: Study,
    folder: str | Path,
    *,
    budget: str | float | None = None,
    computing: Computing | None = None,
    watcher: Watcher | None = None,
) -> Studied:
    """Search, freeze the winner in `folder`/winner.toml, and confirm it.

    The halves have no seed and no image in common, and ledgers of their own: `folder`/tune/ledger.jsonl has no test accuracy, because
    tuning is given no test images; `folder`/confirm/ledger.jsonl has the baseline and the winner, each training once. What was stopped
    or killed goes on from its last epoch, to the same winner. The learning rate of the baseline is chosen first, among the same as the
    recipe's; then settings are tried, seed by seed, and dropped early where they are worse than the median at the same training.

    Args:
        wanted: of `read_study`.
        folder: of this study alone; made when it is not there.
        budget: "25m", "2h", "90s" or seconds; then the training that runs stops at the end of its epoch.
        computing: how.
        watcher: told of progress; it hears of each half as of a sweep, of the first with as many trainings as there may be at most.

    Raises:
        AnymaskError: for data or settings that do not fit; nothing is written before. When optuna is not installed.
        SettingError: when `folder` is another study's, or another process is at it.
        TechniqueError: when nothing that was tried could be trained.
        KeyboardInterrupt, MemoryError: what is finished is kept.
    """
    clock = Clock.within(budget)
    folder, watcher = Path(folder), watcher or Watcher()
    _same_study(wanted, folder)
    how: dict[str, Any] = {"computing": computing, "clock": clock, "watcher": watcher}
    tuning = None
    if not (folder / WINNER).exists():
        _optuna()
        tuning = Tuning(wanted, folder / "tune", cut=tuning_cut(wanted), **how)
    with claimed(folder / "study.lock") as mine:
        if not mine:
            raise SettingError(f"another process works on {folder}", allowed="one at a time", fix="wait for it, or choose another --out")
        if tuning is not None:
            with atomic(folder / STUDY, "w") as file:
                json.dump(wanted.table, file)
            search = _Search(tuning, folder)
            try:
                search.run()
            except Stopped:
                return Studied(len(search.finished()))
        winner = read_winner(folder / WINNER)
        outcome = _confirm(wanted, winner, folder, **how)
        _report(wanted, winner, folder)
        return Studied(wanted.trials, winner, outcome)


def _same_study(wanted: Study, folder: Path) -> None:
    """Refuse a folder of other settings; before there is a winner, more trials are welcome."""
    if not (folder / STUDY).exists():
        return
    try:
        there = dict(json.loads((folder / STUDY).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        fix = "remove it if the study is as it was, or choose another --out"
        raise FileFormatError(f"{folder / STUDY} cannot be read ({error})", allowed="the study that was begun here", fix=fix) from error
    open_ = () if (folder / WINNER).exists() else ("trials",)
    names = sorted({*there, *wanted.table} - {"about"})
    differing = [name for name in names if _settled(there.get(name), open_) != _settled(wanted.table.get(name), open_)]
    if differing:
        raise SettingError(
            f"{folder} holds a study with another {', '.join(f'[{name}]' for name in differing)}",
            allowed="the study that it was begun with" + (", with more trials or fewer" if open_ else ", whose winner is chosen"),
            fix="choose another --out; after a confirmation, with other seeds under [confirm]",
        )


def _settled(value: Any, left_out: Sequence[str]) -> Any:
    return {key: inner for key, inner in value.items() if key not in left_out} if isinstance(value, Mapping) else value


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise AnymaskError(
            "optuna is not installed, and studies search with it", allowed="optuna 4 or newer", fix="pip install 'anymask[study]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class _Search:
    """The tuning half, with the search in its journal."""

    def __init__(self, tuning: Tuning, folder: Path) -> None:
        self.optuna, self.tuning, self.study, self.folder = _optuna(), tuning, tuning.study, folder
        self.journal = self._open(folder / JOURNAL)

    def _open(self, path: Path) -> Any:
        """The search as far as it is; a trial that was stopped or killed begins anew, with its finished trainings in the ledger."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        storage = self.optuna.storages.JournalStorage(self.optuna.storages.journal.JournalFileBackend(str(path)))
        pruner = self.optuna.pruners.MedianPruner()
        found = self.optuna.create_study(storage=storage, study_name="tune", direction="maximize", pruner=pruner, load_if_exists=True)
        state = self.optuna.trial.TrialState
        for trial in found.get_trials(states=(state.RUNNING,)):
            found.tell(trial.number, state=state.FAIL)
        return found

    def finished(self) -> list[Any]:
        """The trials that count, in their order."""
        state = self.optuna.trial.TrialState
        return self.journal.get_trials(deepcopy=False, states=(state.COMPLETE, state.PRUNED))

    def run(self) -> None:
        """Try settings until all trials are used up; then write the winner."""
        rates = self.tuning.rates()
        before = self.tuning.best(rates)
        while len(self.finished()) < self.study.trials:
            trial = self._ask(before)
            name = variant_name(self.study.base, self._changes(trial))
            points, trainings, end = self._try(trial, name, before)
            for key, value in {"recipe": name, "points": points, "trainings": trainings, "end": end}.items():
                trial.set_user_attr(key, value)
            state = self.optuna.trial.TrialState
            self.journal.tell(trial, *([points] if end == "finished" else []), state=state.COMPLETE if end == "finished" else state.PRUNED)
        trials = [Trial(**trial.user_attrs) for trial in self.finished()]
        winner = self._winner(trials, before)
        with atomic(self.folder / TUNED, "w") as file:
            file.write(tuning_table(self.study, rates, trials, winner))
        winner.write(self.folder / WINNER)

    def _ask(self, before: Rate) -> Any:
        """The next trial. Its lots depend on how many have finished alone, so that a search that was killed draws them again."""
        done = len(self.finished())
        lots = int(settings_id({"search_seed": self.study.search_seed, "trial": done})[:8], 16)
        random = min(10, (self.study.trials + 1) // 2)  # settings before the sampler learns from them; Optuna's 10, in a small search fewer
        self.journal.sampler = self.optuna.samplers.TPESampler(seed=lots, n_startup_trials=random)
        first = base_changes(self.study.base, self.study.space, lr=before.lr)
        if done == 0 and first is not None and not self.journal.get_trials(states=(self.optuna.trial.TrialState.WAITING,)):
            self.journal.enqueue_trial(first)  # the recipe as it is
        return self.journal.ask()

    def _changes(self, trial: Any) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for name, choice in self.study.space.items():
            if switched_off(name, changes):
                continue
            if choice.values:
                changes[name] = trial.suggest_categorical(name, choice.values)
            else:
                changes[name] = rounded(trial.suggest_float(name, choice.low, choice.high, log=choice.log))
        return changes

    def _try(self, trial: Any, name: str, before: Rate) -> tuple[float | None, int, str]:
        """The mean paired difference of `name`, of how many trainings, and how that ended."""
        differences: list[float] = []
        try:
            planned = self.tuning.tasks(name)
        except AnymaskError as error:
            return None, 0, reason_of(error)
        for step, (task, accuracy) in enumerate(zip(planned, before.accuracies, strict=True), 1):
            found = self.tuning.accuracy(task)
            if found is None:
                return fmean(differences) if differences else None, len(differences), self.tuning.reason
            differences.append(found - accuracy)
            if self.tuning.first <= step < len(planned):  # from the end of the first seed on: one mask alone says little
                trial.report(fmean(differences), step)
                if trial.should_prune():
                    return fmean(differences), step, "pruned"
        return fmean(differences), len(differences), "finished"

    def _winner(self, trials: Sequence[Trial], before: Rate) -> Winner:
        whole = [(trial.points, trial) for trial in trials if trial.end == "finished" and trial.points is not None]
        if not whole:
            raise TechniqueError(
                f"none of {len(trials)} settings of {self.study.base} could be trained to the end ({trials[-1].end})",
                allowed="a space that holds settings which can",
                fix="narrow [space], or raise trials",
            )
        points, best = max(whole, key=lambda entry: entry[0])
        return Winner(best.recipe, before.name, round(points, 4), best.trainings)


def _mend(path: Path) -> None:
    """Drop the half line of a write that was cut, and the lock of a process that was killed: this one holds the folder."""
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    if path.exists():
        whole = path.read_bytes()
        if not whole.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(whole.rfind(b"\n") + 1)


def _confirm(wanted: Study, winner: Winner, folder: Path, *, computing: Computing | None, clock: Clock, watcher: Watcher) -> Outcome:
    """Train what the confirmation's ledger lacks of the baseline and the winner."""
    benches, plan = Benches(cut=confirmation_cut(wanted)), Plan((with_recipes(wanted.confirm, winner.baseline, winner.recipe),))
    planned = tasks(plan, folder / "confirm", computing, benches=benches)
    worker = Worker(planned, folder / "confirm", retries=RETRIES, computing=computing, clock=clock, benches=benches)
    done = worker.ledger.ids()
    watcher.begin(total=len(planned), done=sum(task.name in done for task in planned))
    with suppress(Stopped):
        worker.work(watcher)
    return worker.outcome()


def _report(wanted: Study, winner: Winner, folder: Path) -> None:
    """Write study.md: which numbers chose, and which confirm."""
    rows, failures = (Ledger(folder / "confirm" / f"{name}.jsonl").rows() for name in ("ledger", "failures"))
    first = [*failed_table(failures, rows), *overviews(rows, baseline=winner.baseline)]
    confirmed = [
        markdown(first) if first else "",
        table(rows, baseline=winner.baseline),
        "- Both recipes share mask and seed in each pair, and each has the learning rate that tuning chose for it.",
    ]
    lines = [
        f"# Study: {wanted.about or wanted.base}",
        f"\n## Tuning: {where(wanted, 'tune')}\n\nValidation accuracies. These chose, and prove nothing.\n",
        (folder / TUNED).read_text(),
        f"\n## Confirmation: {where(wanted, 'confirm')}\n",
        f"Test accuracies, of seeds and images that tuning has not seen, of {winner.recipe} against {winner.baseline}.\n",
        *confirmed,
    ]
    with atomic(folder / REPORT, "w") as file:
        file.write("\n".join(lines) + "\n")
