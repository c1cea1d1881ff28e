#!/usr/bin/env bash
# Mutation testing: breaks the code in one place at a time, and sees whether a test fails.
#
#   cargo install cargo-mutants
#   tests/mutants.sh                        # everything below, a night or two
#   tests/mutants.sh --shard 3/40           # one part of forty
#   tests/mutants.sh --list                 # what would be tried
#   tests/mutants.sh --file src/rewrite.rs  # other files
#
# Prints how many mutants were killed, lists those that survived, and fails if fewer than 85 % were killed. A mutant that no test
# can kill because it computes the same belongs in EQUIVALENT, with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."

# What decides, solves, refuses and converts. Numerics, files and runtimes have oracles of their own.
FILES=(
    'src/rewrite*' 'src/rewrite/**' 'src/decide*' 'src/decide/**'
    'src/convert*' 'src/convert/**'
    'src/plan/**'
    'src/solve/**'
    'src/targets/**'
    '**/fold_fake_quant.rs'
)
# Regular expressions on what cargo-mutants calls a mutant.
EQUIVALENT=(
    'impl (Debug|Display|std::fmt::Display|fmt::Display) for'  # words for people, which golden files hold
    'Clock'                                                    # seconds in a report
)
LEAST=85

files=()
rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --file) files+=(--file "$2"); shift 2 ;;
        *) rest+=("$1"); shift ;;
    esac
done
if [ ${#files[@]} -eq 0 ]; then
    for glob in "${FILES[@]}"; do files+=(--file "$glob"); done
fi
for pattern in "${EQUIVALENT[@]}"; do files+=(--exclude-re "$pattern"); done

# A copy of the sources with a copy of the compiled dependencies: tract would take longer than hundreds of mutants. Few tests
# compute much, and compiling is what takes time.
export CARGO_PROFILE_DEV_OPT_LEVEL=0 CARGO_PROFILE_DEV_DEBUG=false
# Frames that are not optimized are larger than threads of tests have room for where texts nest deep.
export RUST_MIN_STACK=8388608
# Expected texts are compared, never rewritten.
unset AMAX_BLESS
out=${CARGO_TARGET_DIR:-target}/mutants
mkdir -p "$out"
code=0
cargo mutants "${files[@]}" "${rest[@]}" --output "$out" --copy-target=true --baseline=run --no-shuffle \
    --test-tool=cargo --cap-lints=true --timeout-multiplier 4 -- --test it || code=$?
case " ${rest[*]-} " in *" --list "*) exit "$code" ;; esac
# 2: some survived; 3: some ran out of time, which kills as well.
if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "$code" -ne 3 ]; then exit "$code"; fi

found=$out/mutants.out
count() { wc -l <"$found/$1.txt"; }
killed=$(($(count caught) + $(count timeout)))
survived=$(count missed)
printf '\n%d killed, %d survived, %d do not compile\n' "$killed" "$survived" "$(count unviable)"
sed 's/^/  survived: /' "$found/missed.txt"
if [ $((killed * 100)) -lt $(((killed + survived) * LEAST)) ]; then
    echo "error: fewer than $LEAST % were killed" >&2
    exit 1
fi
