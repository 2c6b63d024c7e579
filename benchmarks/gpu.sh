#!/usr/bin/env bash
# The paper's grid (plans/paper.toml) on one GPU, in runs of under ten minutes: call it again until nothing is left.
#
#   benchmarks/gpu.sh              unpack the data, if they are not, and train as much as the time allows
#   benchmarks/gpu.sh --data-only  unpack what is there, say what is missing, and stop
#   benchmarks/gpu.sh [option]...  other options go to `anymask sweep`, after --compile $COMPILE --streams $STREAMS
#
# For a quarter of an hour of a GPU: PLAN=plans/gpu.toml RUN=runs/gpu LEDGER=results/gpu/ledger.jsonl benchmarks/gpu.sh
#
# Finished trainings are in results/paper/ledger.jsonl, which is what gets committed. What belongs to the machine (masks,
# checkpoints of stopped trainings) is in runs/paper, which git ignores. A run begins by bringing together the rows of both, so
# that neither an older ledger from another machine nor a lost runs/paper costs a finished training.
#
# For a machine that takes 64 MiB a call and has no network, benchmarks/lent_gpu.sh makes parts and prints the calls. The packs
# (../shared/data/README.md) with unpack.py lie in data-local/packs then; what is unpacked stays in data-local. Where $OUT names a folder, the
# ledger, the rounds of lottery tickets and the checkpoints of stopped trainings (as stopped.tar.gz.00 and so on) are left there to be taken
# home; runs/tickets.tar.gz and runs/stopped.tar.gz*, if there, are unpacked before the next run.
#
# Masks cost a GPU time that trainings could have (SynFlow 33 s for a ResNet-18, on an H200): make them before, on any machine, by
# `anymask sweep plans/paper.toml --out runs/paper --masks-only`, and carry runs/paper/masks.
# Trainings of `default` alone gain less by a second process than by more streams; a sweep of all recipes was slower in one of eight streams than in
# two of three (docs/speed.md): if masks are made, --workers 2 is worth a try.
#
# Settings: LIMIT seconds for the whole run (590) and ROOM of them (50) for its start and end, PLAN, RUN, LEDGER, DATA, PACKS, PYTHON, DEVICE,
# COMPILE (graph), STREAMS (4; 1 where COMPILE is off or on). The exit code is that of `anymask sweep`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LIMIT=${LIMIT:-590}
PLAN=${PLAN:-plans/paper.toml}
RUN=${RUN:-runs/paper}
LEDGER=${LEDGER:-results/paper/ledger.jsonl}
DATA=${DATA:-data-local} # as the plan has it
DEVICE=${DEVICE:-cuda}
COMPILE=${COMPILE:-graph}
case $COMPILE in graph | fused) STREAMS=${STREAMS:-4} ;; *) STREAMS=${STREAMS:-1} ;; esac # others train one at a time
ROOM=${ROOM:-50} # for the start, for the end of an epoch or of a ticket's round, and for what is taken home
TICKETS=runs/tickets.tar.gz
STOPPED=${STOPPED:-runs/stopped.tar.gz}
MOST=$((15 * 1024 * 1024)) # bytes of one file that is taken home
PARTS_MOST=3               # of checkpoints: a call that brings them back carries 64 MiB in all

fail() {
    printf 'gpu.sh: %s\n' "$@" >&2
    exit 2
}

choose_python() {
    if [[ -z ${PYTHON:-} ]]; then
        PYTHON=python3
        [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
    fi
    export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    # torch is looked for alone: to import it takes seconds
    "$PYTHON" -c 'import cyclopts, importlib.util, rich, safetensors, scipy, sys, yaml; sys.exit(importlib.util.find_spec("torch") is None)' ||
        fail "$PYTHON lacks a package that anymask needs" "install anymask, or carry wheels and name their folder in PYTHONPATH"
}

# -- data ---------------------------------------------------------------------------------------------------------------
declare -A LAST=( # what unpack.py writes last, so that half a set is not taken for a whole one
    [cifar100]=cifar-100-python/meta
    [cifar10-10k]=cifar-10-10k/batches.meta
    [tiny-10k]=tiny-imagenet-200/wnids.txt
)
declare -A NAMES=([cifar100]=cifar100 [cifar10-10k]=cifar10 [tiny-10k]=tiny-imagenet) # as plans have them
declare -A PARTS=(
    [cifar100]="cifar100_labels.npz cifar100_train_a.wpk cifar100_train_b.wpk cifar100_test.wpk"
    [cifar10-10k]="cifar10_10k2k_labels.npz cifar10_10k2k_train.wpk cifar10_10k2k_test.wpk"
    [tiny-10k]="tin_wnids.txt tin_10k2k_train.jpk.xz tin_10k2k_val.jpk.xz"
)

packs_folder() {
    local folder
    for folder in "${PACKS:-}" "$DATA/packs" ../shared/data shared/data; do
        if [[ -n $folder && -f $folder/unpack.py ]]; then
            echo "$folder"
            return
        fi
    done
}

# unpack SET FOLDER: 0 when the set is there in the end, else 1, with what is missing said
unpack() {
    local part missing=()
    [[ -e $DATA/${LAST[$1]} ]] && return 0
    for part in ${PARTS[$1]}; do
        [[ -n $2 && -f $2/$part ]] || missing+=("$part")
    done
    if ((${#missing[@]})); then
        echo "gpu.sh: $1 is not there yet; missing: ${missing[*]}" >&2
        return 1
    fi
    "$PYTHON" "$2/unpack.py" "$DATA" "$1" >&2
}

prepare_data() {
    local folder name
    folder=$(packs_folder)
    absent=()
    for name in cifar100 cifar10-10k tiny-10k; do # in the order of the plan's blocks
        grep -q "^data = .*\"${NAMES[$name]}\"" "$PLAN" || continue
        unpack "$name" "$folder" || absent+=("$name")
    done
}

# -- rows and tickets -----------------------------------------------------------------------------------------------------
# merge FROM INTO: rows of FROM that INTO lacks are added to it
merge() {
    [[ -f $1 ]] || return 0
    "$PYTHON" - "$1" "$2" <<'PY'
import sys
from anymask.runlog import Ledger

source, target = map(Ledger, sys.argv[1:])
known = target.ids()
for row in source.rows():
    if row["id"] not in known:
        target.append(row)
PY
}

# take_home: rows, tickets and stopped trainings into $OUT; not the weights that tickets start from, which the seed gives, nor a round that
# was stopped. What is pruned is zeros: of 135 to 146 MB of a ResNet-18 at 98% gzip leaves 5 to 15.
take_home() {
    [[ -n ${OUT:-} && -d ${OUT:-} ]] || return 0
    if [[ -f $LEDGER ]]; then cp "$LEDGER" "$OUT/ledger.jsonl"; fi
    if compgen -G "$RUN/masks/lottery*" >/dev/null; then
        (cd "$RUN" && tar -czf - --exclude='*.safetensors' --exclude='*.pt' masks/lottery*) >"$OUT/tickets.tar.gz"
        if (($(stat -c %s "$OUT/tickets.tar.gz") > MOST)); then
            rm "$OUT/tickets.tar.gz"
            echo "gpu.sh: the lottery tickets are too large to take home; another machine would find them anew" >&2
        fi
    fi
    if compgen -G "$RUN/unfinished/*.pt" >/dev/null; then
        (cd "$RUN" && tar -cf - unfinished/*.pt | gzip -1) | split -d -b "$MOST" - "$OUT/stopped.tar.gz."
        if (($(ls "$OUT"/stopped.tar.gz.* | wc -l) > PARTS_MOST)); then
            rm "$OUT"/stopped.tar.gz.*
            echo "gpu.sh: the checkpoints are too large to take home; another machine would train from the start" >&2
        fi
    fi
}

# bring_back: what take_home took of stopped trainings, whole or not at all
bring_back() {
    compgen -G "$STOPPED*" >/dev/null || return 0
    local there
    there=$(mktemp -d "$RUN/brought.XXXXXX")
    if cat "$STOPPED"* | tar -xzf - -C "$there"; then
        mkdir -p "$RUN/unfinished"
        local file # not `mv -n`, which fails from coreutils 9.2 on where there is one already
        for file in "$there"/unfinished/*.pt; do
            [[ -e $RUN/unfinished/${file##*/} ]] || mv "$file" "$RUN/unfinished/"
        done
    else
        echo "gpu.sh: $STOPPED* is not whole; its trainings begin again" >&2
    fi
    rm -rf "$there"
}

# -- the run ----------------------------------------------------------------------------------------------------------------
choose_python
prepare_data
if [[ ${1:-} == --data-only ]]; then
    if ((${#absent[@]})); then echo "gpu.sh: still to come: ${absent[*]}" >&2; else echo "gpu.sh: all data are in $DATA" >&2; fi
    exit 0
fi
((${#absent[@]} == 0)) || fail "no run without all data of the plan" "carry what is missing to $DATA/packs, with unpack.py beside it"

mkdir -p "$RUN" "$(dirname "$LEDGER")"
if [[ -f $TICKETS ]]; then tar -xzf "$TICKETS" -C "$RUN" --skip-old-files; fi
bring_back
merge "$LEDGER" "$RUN/ledger.jsonl"

budget=$((LIMIT - ROOM - SECONDS))
((budget >= 60)) || fail "$SECONDS s went to the data, and too little of $LIMIT s is left" "call it again"
code=0
timeout --signal=INT --kill-after=10 "$((LIMIT - 10 - SECONDS))" \
    "$PYTHON" -m anymask sweep "$PLAN" --out "$RUN" --budget "${budget}s" --device "$DEVICE" --compile "$COMPILE" --streams "$STREAMS" "$@" || code=$?

merge "$RUN/ledger.jsonl" "$LEDGER"
take_home
rows=0
if [[ -f $LEDGER ]]; then rows=$(wc -l <"$LEDGER"); fi
echo "gpu.sh: $rows trainings are in $LEDGER after $SECONDS s; what is left is said above. The same command goes on." >&2
exit "$code"
