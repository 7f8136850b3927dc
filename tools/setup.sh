#!/usr/bin/env bash
# Prints the Python of an environment in which the project runs; the rest goes to stderr:
#   python=$(bash tools/setup.sh [EXTRA ...])          for example: tools/setup.sh tests
# An active environment whose toolkits work is used, and gets no more than the project and
# its extras. Otherwise .venv is made from uv.lock (.venv-openmmlab with STACK=openmmlab;
# PYTHON names an interpreter). mmcv is taken compiled from the index of its publishers
# (another: MMCV_BASE_URL) or the user's cache, or compiled for it (MAX_JOBS, CXX, ...).
set -euo pipefail
say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*" && exit 1; }
unset CDPATH && cd "$(dirname "${BASH_SOURCE[0]}")/.."
asked=${STACK:-} stack=${STACK:-onedl}
case $stack in
  onedl) venv=$PWD/.venv mmcv=onedl-mmcv ;;
  openmmlab) venv=$PWD/.venv-openmmlab mmcv=mmcv ;;
  *) fail "STACK=$stack is not known: use STACK=onedl or STACK=openmmlab" ;;
esac
ask() { "$1" tools/stack.py "${@:2}" 2>/dev/null; }
active=$(python -c 'import sys; print(sys.executable)' 2>/dev/null) || active=$venv/
if [[ -z ${PYTHON:-} && $active != "$venv/"* ]] && ask "$active" works $asked; then
  ask "$active" has "$@" || (IFS=, && "$active" -m pip install --no-build-isolation -c <("$active" -m pip freeze --exclude-editable | grep -v ' @ ') -e ".${*:+[$*]}" >&2) ||
    fail "pip could not add convmlp_mm with its extras to the active environment of $active"
  say "using the active environment of $active" && echo "$active" && exit
fi
py=$venv/bin/python cache=${XDG_CACHE_HOME:-$HOME/.cache}/convmlp_mm log=$venv/setup.log
current=$(cat uv.lock pyproject.toml tools/setup.sh | cksum)
ready() { [[ -f $venv/made_from && $(<"$venv/made_from") == "$current" ]] && ask "$py" has "$stack" "$@" && ask "$py" works "$stack"; }
if ready "$@"; then echo "$py" && exit; fi
mkdir -p "$cache" && exec 9>"$cache/lock"
! command -v flock >/dev/null || flock -n 9 || { say 'waiting until another set-up ends' && flock 9; }
base=${PYTHON:-python3} && uv=$(command -v uv) || uv=$cache/uv/bin/uv
[[ -x $uv ]] || { "$base" -m venv --clear "$cache/uv" && "$cache/uv/bin/pip" install -q 'uv>=0.9'; } >&2 ||
  fail 'uv could not be fetched: check the network and that python3 has venv, or install uv'
index=${PIP_INDEX_URL:-$("$base" -m pip config get global.index-url 2>/dev/null || true)}
[[ -z $index ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$index}
[[ -x $py ]] || say "making $venv, for which up to 4 GB are downloaded"
[[ -x $py ]] || "$uv" venv -q --seed --allow-existing ${PYTHON:+--python "$PYTHON"} "$venv" >&2 ||
  fail 'no environment could be made: install Python 3.10 to 3.12, or name it with PYTHON='
locked() { "$uv" export -q --frozen --no-header --no-annotate --no-emit-project --extra "$stack" --group build "$@"; }
only() { locked --group headless | sed -n "/^$1==/,/[^\\\\]\$/p"; }
add() { "$uv" pip install -q --python "$py" "$@" >&2; }
locked "${@/#/--extra=}" --no-emit-package $mmcv >"$venv/locked.txt" || fail "uv.lock cannot give $stack with: $*"
add --compile-bytecode --require-hashes -r "$venv/locked.txt" && add --no-deps --no-build-isolation -e . ||
  fail 'a download failed: check the network and the index that pip is configured with, then run this again'
"$py" -c 'import cv2' 2>/dev/null || add --no-deps --reinstall -r <(only opencv-python-headless)
read -r range page kept < <(ask "$py" mmcv "$stack") || fail "torch does not run: remove $venv and run this again"
kept=$cache/wheels/$kept && mkdir -p "$kept"
take() { UV_HTTP_RETRIES=1 add --no-config --no-deps --no-index --only-binary :all: --reinstall --find-links "$1" "$range" 2>>"$log" && ask "$py" works "$stack"; }
if ! ask "$py" works "$stack" && ! take "$page" && ! take "$kept"; then
  command -v ${CXX:-c++} >/dev/null || fail 'no compiled mmcv could be fetched, and there is no C++ compiler: install g++, or name one with CXX='
  only $mmcv >"$venv/mmcv.txt" && export PATH="$venv/bin:$PATH" MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
  "$py" -m pip wheel -v --no-deps --no-cache-dir --no-build-isolation --require-hashes -r "$venv/mmcv.txt" -w "$kept" 2>&1 |
    while IFS= read -r line; do
      echo "$line" >>"$log"
      [[ ! $line =~ ^\ *(\[[0-9]+/[0-9]+\]) ]] || say "compiling mmcv, once: ${BASH_REMATCH[1]}"
    done && take "$kept" || fail "mmcv could not be compiled: the end of $log says why"
fi
echo "$current" >"$venv/made_from"
ready "$@" || fail "the environment does not work: remove $venv and run this again"
say "$venv is ready after $SECONDS s" && echo "$py"
