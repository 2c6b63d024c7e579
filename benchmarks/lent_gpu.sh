#!/usr/bin/env bash
# What a lent GPU machine needs for benchmarks/gpu.sh, in parts that a call can carry, and the calls themselves: run it on any machine before.
# A lent minute is worth more than an own one: of the first 15, four went to a failed call and to masks that this makes before.
#
#   benchmarks/lent_gpu.sh             all four below
#   benchmarks/lent_gpu.sh masks       make the masks of the plan, in $RUN, and pack them for gpu.sh (64 MiB a call, all in git with it)
#   benchmarks/lent_gpu.sh wheels      fetch the packages that the machine lacks; it has torch and no network
#   benchmarks/lent_gpu.sh packs       cut the image packs of the plan into parts, in runs/lent
#   benchmarks/lent_gpu.sh calls       print what to give the tool `run`, one after the other, and what comes after
#
# Settings: PLAN, RUN and LEDGER as gpu.sh has them, PACKS where the packs and unpack.py are, PART bytes of a part, LENT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PLAN=${PLAN:-plans/gpu.toml}
RUN=${RUN:-runs/gpu}
LEDGER=${LEDGER:-results/gpu/ledger.jsonl}
PACKS=${PACKS:-../shared/data}
PYTHON=${PYTHON:-.venv/bin/python}
PART=${PART:-50000000}  # of 64 MiB, with room for the masks
LENT=${LENT:-runs/lent} # ignored by git, as what is carried has to be
TICKETS=runs/tickets.tar.gz # as gpu.sh has it
STOPPED=${STOPPED:-runs/stopped.tar.gz}
MISSING=(cyclopts docstring-parser rich-rst docutils)
declare -A FILES=([cifar100]="cifar100_*" [cifar10]="cifar10_*" [tiny-imagenet]="tin_*")

masks() {
    mkdir -p "$RUN"
    if [[ -f $LEDGER && ! -f $RUN/ledger.jsonl ]]; then cp "$LEDGER" "$RUN/"; fi
    "$PYTHON" -m anymask sweep "$PLAN" --out "$RUN" --masks-only
    tar -czf "$TICKETS" -C "$RUN" --exclude='*.safetensors' --exclude='*.pt' --exclude='*.lock' masks
}

wheels() {
    mkdir -p "$LENT/wheels"
    rm -f "$LENT"/wheels/*.whl # two versions of one package are refused there
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 -d "$LENT/wheels" "${MISSING[@]}"
}

packs() {
    local name files=(unpack.py)
    for name in cifar100 cifar10 tiny-imagenet; do
        if grep -q "^data = .*\"$name\"" "$PLAN"; then
            files+=($(cd "$PACKS" && compgen -G "${FILES[$name]}"))
        fi
    done
    mkdir -p "$LENT"
    rm -f "$LENT"/part*
    tar -cf - -C "$PACKS" "${files[@]}" | split -d -b "$PART" - "$LENT/part"
}

# call SECONDS COMMAND CARRIED...
call() {
    printf 'timeout_s %s, carry [%s]:\n%s\n\n' "$1" "$(printf '"%s", ' "${@:3}" | sed 's/, $//')" "$2"
}

calls() {
    local parts=("$LENT"/part*) part last site=/tmp/site ready
    last=${parts[-1]}
    ready="python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target $site $LENT/wheels/*.whl"
    ready+=" && PYTHONPATH=src:$site python3 -m anymask list protocols" # a package that is missing is told before more is carried
    if compgen -G "$STOPPED*" >/dev/null; then # with a part they would be more than a call carries
        call 120 "$ready && cp $STOPPED* /tmp/" "$LENT/wheels" "$STOPPED"*
        ready=
    fi
    for part in "${parts[@]::${#parts[@]}-1}"; do # what a call does not carry is removed, so parts are kept elsewhere
        call 120 "${ready:+$ready && }cp $part /tmp/" ${ready:+"$LENT/wheels"} "$part"
        ready=
    done
    local commit
    commit=$(git rev-parse --short HEAD)$(git diff --quiet HEAD -- src || echo -dirty)
    local run="export ANYMASK_COMMIT=$commit PYTHONPATH=$site PLAN=$PLAN RUN=$RUN LEDGER=$LEDGER"
    run+=" STOPPED=/tmp/$(basename "$STOPPED"); benchmarks/gpu.sh"
    call 600 "${ready:+$ready && }mkdir -p data-local/packs && cat \$(ls /tmp/part* 2>/dev/null) $last | tar -xf - -C data-local/packs && $run" \
        ${ready:+"$LENT/wheels"} "$last" "$TICKETS"
    echo 'Each call within 30 s of the last, or the machine goes, with what is half trained on it.'
    echo 'A call is cut to what is left to the session, which gpu.sh does not know: LIMIT is to be ten seconds less than that, in the first, too.'
    echo 'While more than three minutes are left:'
    call '...' "${run/benchmarks/LIMIT=... benchmarks}" "$TICKETS"
    echo "After each: copy ledger.jsonl of the files that came back to $LEDGER, .venv/bin/python tools/make_docs.py, commit. Last: give_back,"
    echo "and copy stopped.tar.gz.* to runs/, in place of those that are there, for the next machine."
}

if (($# == 0)); then set -- masks wheels packs calls; fi
for step in "$@"; do
    case $step in
    masks | wheels | packs | calls) "$step" ;;
    *) echo "lent_gpu.sh: $step came; allowed: masks, wheels, packs, calls; leave it out for all of them" >&2 && exit 2 ;;
    esac
done
