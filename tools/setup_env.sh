#!/usr/bin/env bash
# Finds or makes a Python environment in which the project runs.
#
#   tools/setup_env.sh [EXTRA ...]     for example: tools/setup_env.sh tests
#
# Run it, do not source it. Everything it has to say goes to stderr; stdout is one
# line, the path of the Python to use. A calling script puts that on PATH:
#
#   python=$(bash tools/setup_env.sh tests) || exit 1
#   export PATH="$(dirname "$python"):$PATH"
#
# The active environment is taken if mmengine, mmcv, mmdet, mmseg and mmpretrain are
# there and the compiled operators of mmcv run. Nothing is installed into it but the
# project itself (a link) and what is missing of the extras asked for. Otherwise a
# virtual environment is made, or continued. The choices, as environment variables:
#
#   STACK                onedl (default) or openmmlab: whose distributions. If given,
#                        an active environment with the other stack is not taken.
#   VENV                 the virtual environment. Default: .venv in the repository,
#                        .venv-openmmlab for that stack. If given, the active
#                        environment is not looked at.
#   PYTHON               the interpreter to make it from; likewise.
#   TORCH_VERSION, TORCHVISION_VERSION
#                        other releases than the defaults below. They are remembered
#                        in the virtual environment.
#   MAX_JOBS, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, FORCE_CUDA
#                        as in any build of a torch extension; PIP_* reach pip.
#
# The operators of mmcv are compiled once and kept as a wheel under
# ${XDG_CACHE_HOME:-~/.cache}/convmlp_mm/wheels. The ranges of all versions stand in
# setup.py; the script reads them there.
set -euo pipefail
unset CDPATH

say() { printf 'setup_env: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
[[ -f $root/setup.py ]] ||
  fail "no setup.py in $root: run the script of a checkout of the project"
[[ -n ${XDG_CACHE_HOME:-}${HOME:-} ]] ||
  fail 'set HOME or XDG_CACHE_HOME: the compiled operators are kept there'
cache=${XDG_CACHE_HOME:-$HOME/.cache}/convmlp_mm

asked_stack=${STACK:-}
stack=${STACK:-onedl}
case $stack in
  onedl | openmmlab) ;;
  *) fail "STACK=$stack is not known: use STACK=onedl or STACK=openmmlab" ;;
esac
case $stack-$(uname -m) in
  onedl-x86_64) default_torch=2.14.1 default_torchvision=0.29.1 ;;
  onedl-*) default_torch=2.9.1 default_torchvision=0.24.1 ;;
  openmmlab-*) default_torch=2.2.2 default_torchvision=0.17.2 ;;
esac

if [[ -n ${VENV:-} ]]; then
  venv=$VENV
  [[ $venv == /* ]] || venv=$PWD/$venv
elif [[ $stack == onedl ]]; then
  venv=$root/.venv
else
  venv=$root/.venv-$stack
fi
venv=${venv%/}
# The state of the set-up is kept in the environment itself:
#   choice  what it was made for        busy  pip is changing it (or was killed then)
#   done    checksum of the files that the last complete set-up followed
# The folder also tells that the environment is this script's, to remove at will.
state=$venv/.made_by_setup_env
log=$state/log.txt
started=$SECONDS
unset PYTHONHOME

# --- Small pieces in Python --------------------------------------------------------

# Prints the requirements of the package and of the extras named, read from setup.py.
requirements() { # PYTHON EXTRA ...
  "$1" - "$root/setup.py" "${@:2}" <<'PY'
import ast
import sys

with open(sys.argv[1], encoding='utf-8') as file:
    body = ast.parse(file.read()).body
said = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in body
    if isinstance(node, ast.Assign)
    and node.targets[0].id in ('REQUIREMENTS', 'EXTRAS')
}
print(*said['REQUIREMENTS'], sep='\n')
for name in sys.argv[2:]:
    print(*said['EXTRAS'][name], sep='\n')
PY
}

# Looks at an environment: runs the operators, then prints one line each: the stack,
# the torch version, the prefix, where convmlp_mm is, and what is missing of the
# requirements given. Status 3 and no output: no toolkits here. Status 4: the toolkits
# are here and do not work, for the reason printed.
examine() { # PYTHON REQUIREMENT ...
  "$1" - "${@:2}" 2>/dev/null <<'PY'
import sys
from importlib import metadata, util

sys.path = [p for p in sys.path if p]  # what lies in the working folder does not count
report, sys.stdout = sys.stdout, sys.stderr

found = [
    name
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    if util.find_spec(name)
]
if not {'mmcv', 'mmdet', 'mmseg', 'mmpretrain'} & set(found):
    sys.exit(3)


def unusable(reason):
    print(reason, file=report)
    sys.exit(4)


if len(found) < 6:
    unusable(f'it has only {", ".join(found)}')
names = {d.metadata['Name'].lower() for d in metadata.distributions()}
stacks = [s for s, d in (('onedl', 'onedl-mmcv'), ('openmmlab', 'mmcv')) if d in names]
if len(stacks) != 1:
    unusable('it mixes both stacks' if stacks else 'its mmcv is of neither stack')
try:
    import torch
    from mmcv.ops import nms, roi_align

    for device in ['cpu'] + ['cuda'] * torch.cuda.is_available():
        boxes = torch.tensor(
            [[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30.0]], device=device
        )
        kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1]
        image = torch.arange(16.0, device=device).view(1, 1, 4, 4)
        region = torch.tensor([[0, 0, 0, 4, 4.0]], device=device)
        means = roi_align(image, region, (2, 2), 1.0, 2, 'avg', True).flatten()
        if kept.tolist() != [0, 2] or means.tolist() != [2.5, 4.5, 10.5, 12.5]:
            unusable(f'mmcv.ops gives wrong results on {device}')
except Exception as error:
    unusable(f'mmcv.ops does not run: {" ".join(str(error).split())[:300]}')

spec = util.find_spec('convmlp_mm')
place = spec.origin if spec and spec.origin else ''
print(stacks[0], torch.__version__, sys.prefix, place, sep='\n', file=report)
for text in sys.argv[1:]:
    from pip._vendor.packaging.requirements import Requirement

    requirement = Requirement(text)
    try:
        if metadata.version(requirement.name) in requirement.specifier:
            continue
    except metadata.PackageNotFoundError:
        pass
    print(text, file=report)
PY
}

# Names the folder of the wheel: all that the compiled operators depend on.
wheel_key() { # PYTHON MMCV_REQUIREMENT
  "$1" - "$stack" "$2" <<'PY'
import os
import platform
import re
import sys
import sysconfig

import torch

device = 'cpu'
if torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1':
    devices = range(torch.cuda.device_count())
    capabilities = {'%d.%d' % torch.cuda.get_device_capability(i) for i in devices}
    listed = os.environ.get('TORCH_CUDA_ARCH_LIST') or ' '.join(sorted(capabilities))
    device = f'cuda{torch.version.cuda}-{listed}'
parts = [
    sys.argv[1],
    sys.argv[2],
    f'torch-{torch.__version__}',
    sys.implementation.cache_tag,
    sysconfig.get_platform(),
    ''.join(platform.libc_ver()),
    device,
]
print('_'.join(re.sub(r'[^\w.+]+', '-', part).strip('-') for part in parts))
PY
}

# Tells whether a wheel is complete and holds the compiled operators: without torch at
# build time, mmcv makes one without them and says nothing.
wheel_is_good() { # PYTHON WHEEL
  "$1" - "$2" >/dev/null 2>&1 <<'PY'
import re
import sys
import zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    extension = any(re.match(r'mmcv/_ext.*\.so$', name) for name in wheel.namelist())
    sys.exit(bool(wheel.testzip()) or not extension)
PY
}

# --- pip, with its words in the log ------------------------------------------------

log_start=1
pip_run() { # PYTHON ARGUMENTS OF PIP ...
  mkdir -p "$(dirname "$log")"
  touch "$log"
  log_start=$(($(wc -l <"$log") + 1))
  printf '$ pip %s\n' "${*:2}" >>"$log"
  "$1" -m pip "${@:2}" --no-input --disable-pip-version-check --progress-bar off \
    >>"$log" 2>&1 </dev/null
}

# Ends the script with one sentence on why pip failed; a build that failed also shows
# the end of its output.
explain_pip() { # WHAT
  local words package requests
  words=$(tail -n "+$log_start" "$log")
  package=$(sed -n 's/.*No matching distribution found for \(.*\)/\1/p' <<<"$words" |
    sed 's/ (from .*//' | tail -n 1)
  requests=$(sed -n 's/.*The user requested //p' <<<"$words" | sort -u | tr '\n' ' ')
  case $words in
    *'No space left on device'*)
      fail "the disk is full: $1 needs more room (the full log: $log)" ;;
    *'No module named pip'*)
      fail "the environment has no pip: add it, or install by hand what is needed for $1" ;;
    *externally-managed-environment*)
      fail "this Python does not let pip install anything: activate a virtual environment of yours, or none (the full log: $log)" ;;
    *'No matching distribution found'*)
      fail "pip found no download of $package: check the network, PIP_INDEX_URL and the version asked for, then run this again (the full log: $log)" ;;
    *'Max retries'* | *ConnectionError* | *'timed out'* | *'Connection broken'* | \
      *IncompleteRead* | *ProxyError* | *SSLError* | *'HTTP error'* | *HTTPError* | \
      *'do not match the hashes'*)
      fail "a download for $1 failed: check the network and PIP_INDEX_URL, then run this again (the full log: $log)" ;;
    *ResolutionImpossible*)
      fail "no versions of $1 go together${requests:+ with ${requests% }}: ask for others (the full log: $log)" ;;
  esac
  tail -n 20 "$log" >&2
  fail "pip failed at $1: see above, and the full log in $log"
}

# Prints what is installed under the names given, as name==version.
installed() { # PYTHON REGULAR_EXPRESSION
  "$1" -m pip list --format freeze --disable-pip-version-check 2>/dev/null |
    grep -iE "^($2)==" || true
}

# While `busy` is there, the environment may be half changed.
change() { # WHAT, ARGUMENTS OF PIP INSTALL ...
  local status=0
  echo $$ >"$state/busy"
  pip_run "$vpy" install --no-user "${@:2}" || status=$?
  # A pip that fails puts back what it had begun; one that was killed does not.
  ((status > 128)) || rm -f "$state/busy"
  ((status == 0)) || explain_pip "$1"
}

temporary=
# shellcheck disable=SC2317 # called by the trap
clean_up() {
  [[ -z $temporary ]] || rm -rf -- "$temporary"
}
trap clean_up EXIT
# A trap, since pip ends by itself on Ctrl-C and bash would then take it for a failure.
trap 'say "interrupted: run it again to go on"; exit 130' INT TERM HUP

# A folder for the build, and for the compiler wrapper: torch puts the name of the
# compiler into its build file unquoted, so there must be no space in it.
make_temporary() {
  local base=${TMPDIR:-/tmp}
  [[ $base != *[[:space:]]* ]] || base=/tmp
  temporary=$(mktemp -d "$base/convmlp_mm-build.XXXXXX")
}

# Waits until no other run holds the lock. pip inherits it, so that it is held until
# the pip of a killed run has ended too. Where there is no flock, there is no lock.
lock() { # DESCRIPTOR NAME WHAT
  command -v flock >/dev/null || return 0
  mkdir -p "$cache/locks" || fail "cannot write to $cache: set XDG_CACHE_HOME"
  eval "exec $1>\"\$cache/locks/\$2\""
  flock -n "$1" || {
    say "another run is at work on $3: waiting for it"
    flock "$1"
  }
}

finish() { # PYTHON MESSAGE
  say "$2"
  printf '%s\n' "$1"
  if [[ -t 1 && -f $(dirname "$1")/activate ]]; then
    say "to work in it: source '$(dirname "$1")/activate'"
  fi
  exit 0
}

# --- What is wanted ----------------------------------------------------------------

for extra in "$@"; do
  case $extra in
    onedl | openmmlab) fail "a stack is chosen by STACK=$extra, not as an argument" ;;
  esac
  grep -q "^    '$extra': \[" "$root/setup.py" ||
    fail "setup.py has no extra called '$extra'"
done

# Sets the array `wanted` to the requirements of the package and the extras asked for.
wanted=()
read_wanted() { # PYTHON, then the extras
  local line
  wanted=()
  while IFS= read -r line; do wanted+=("$line"); done < <(requirements "$@")
}

# Splits what `examine` printed.
seen_stack='' seen_torch='' seen_prefix='' seen_package='' missing=()
take_report() { # REPORT
  local line
  missing=()
  {
    IFS= read -r seen_stack
    IFS= read -r seen_torch
    IFS= read -r seen_prefix
    IFS= read -r seen_package || true
    while IFS= read -r line; do
      [[ -z $line ]] || missing+=("$line")
    done
  } <<<"$1"
}

# --- The active environment --------------------------------------------------------

looked_at=''
use_active() { # PYTHON, then the extras
  local report status=0 py
  # The shims of pyenv stand for a Python elsewhere, or for none.
  py=$("$1" -c 'import sys; print(sys.executable)' 2>/dev/null) || return 0
  # Once each; and this script's own is dealt with below.
  [[ $py != "$looked_at" && $py != "$venv/"* ]] || return 0
  looked_at=$py
  read_wanted "$py" "${@:2}"
  report=$(examine "$py" ${wanted[@]+"${wanted[@]}"}) || status=$?
  case $status in
    0) ;;
    4)
      say "not taking the active environment of $py: $report"
      return 0
      ;;
    *) return 0 ;;
  esac
  take_report "$report"
  if [[ -n $asked_stack && $seen_stack != "$asked_stack" ]]; then
    say "not taking the active environment $seen_prefix: its stack is $seen_stack"
    return 0
  fi
  if [[ -n ${TORCH_VERSION:-} && ${seen_torch%%+*} != "$TORCH_VERSION" ]]; then
    say "not taking the active environment $seen_prefix: its torch is $seen_torch"
    return 0
  fi

  make_temporary
  log=$cache/log.txt
  if [[ -z $seen_package ]]; then
    say "linking convmlp_mm into the active environment $seen_prefix"
    (
      cd "$root"
      pip_run "$py" install --no-deps --no-build-isolation -e . ||
        pip_run "$py" install --no-deps -e .
    ) || explain_pip convmlp_mm
  elif [[ $seen_package != "$root/"* ]]; then
    say "note: convmlp_mm in this environment is that of $(dirname "$seen_package")"
  fi
  if ((${#missing[@]})); then
    say "adding to the active environment $seen_prefix: ${missing[*]}"
    # Whatever these packages would like, the stack stays as it is.
    installed "$py" 'torch|torchvision|numpy|opencv-.*|(onedl-)?mm.*' \
      >"$temporary/constraints.txt"
    pip_run "$py" install -c "$temporary/constraints.txt" "${missing[@]}" ||
      explain_pip "${missing[*]}"
  fi
  finish "$py" \
    "using the active environment $seen_prefix ($seen_stack stack, torch $seen_torch)"
}

if [[ -z ${VENV:-}${PYTHON:-} ]]; then
  for candidate in python "${VIRTUAL_ENV:-}/bin/python" "${CONDA_PREFIX:-}/bin/python"; do
    if [[ $candidate != /bin/python ]] && command -v "$candidate" >/dev/null; then
      use_active "$candidate" "$@"
    fi
  done
fi

# --- The virtual environment, if it is ready ---------------------------------------

read -r oldest newest < <(sed -n \
  "s/^PYTHON_REQUIRES = '>=3\.\([0-9]*\),<3\.\([0-9]*\)'/\1 \2/p" "$root/setup.py")
newest=$((newest - 1))
allowed="3.$oldest to 3.$newest"
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}
python_fits() { # VERSION
  [[ $1 == 3.* ]] && ((${1#3.} >= oldest && ${1#3.} <= newest))
}
if [[ -n ${PYTHON:-} ]]; then
  asked_python=$(python_version "$PYTHON") ||
    fail "PYTHON=$PYTHON does not run: name a Python $allowed"
  python_fits "$asked_python" ||
    fail "PYTHON=$PYTHON is Python $asked_python: name a Python $allowed"
fi

chosen() { sed -n "s/^$1=//p" "$state/choice" 2>/dev/null || true; }
# Versions asked for when the environment was made hold until others are asked for.
if [[ -z ${TORCH_VERSION:-}${TORCHVISION_VERSION:-} && $(chosen asked) == yes ]]; then
  torch=$(chosen torch) torchvision=$(chosen torchvision) asked=yes
elif [[ -n ${TORCH_VERSION:-}${TORCHVISION_VERSION:-} ]]; then
  # Of the two, one given alone leaves pip to find its fellow.
  torch=${TORCH_VERSION:-} torchvision=${TORCHVISION_VERSION:-} asked=yes
else
  torch=$default_torch torchvision=$default_torchvision asked=no
fi
vpy=$venv/bin/python
checksum=$(cat "$root/setup.py" "$root/tools/setup_env.sh" | cksum)
choice="stack=$stack
torch=$torch
torchvision=$torchvision
asked=$asked
path=$venv
root=$root"

# Runs the operators in the environment; sets `problem` to what is wrong or missing.
problem=''
works() { # the extras
  local report status=0
  read_wanted "$vpy" "$@"
  report=$(examine "$vpy" ${wanted[@]+"${wanted[@]}"}) || status=$?
  problem=${report:-the toolkits are not there}
  ((status == 0)) || return 1
  take_report "$report"
  problem="torch is $seen_torch"
  [[ -z $torch || ${seen_torch%%+*} == "${torch%%+*}" ]] || return 1
  problem='convmlp_mm is not linked into it'
  [[ $seen_package == "$root/"* ]] || return 1
  problem=${missing[*]+"${missing[*]} to be added"}
}

is_ready() { # the extras
  [[ ! -e $state/busy && -f $state/done && $(<"$state/done") == "$checksum" &&
    $(cat "$state/choice" 2>/dev/null) == "$choice" ]] || return 1
  [[ -z ${asked_python:-} || $(python_version "$vpy") == "$asked_python" ]] || return 1
  works "$@" && ((${#missing[@]} == 0))
}
say_ready() {
  finish "$vpy" "$venv is ready ($stack stack, torch $seen_torch)"
}
# Without a lock: an environment that is ready is only looked at.
if is_ready "$@"; then say_ready; fi

# --- The virtual environment, made or continued ------------------------------------

lock 8 "venv-$(cksum <<<"$venv" | tr ' ' -)" "$venv"
if is_ready "$@"; then say_ready; fi # another run has made it meanwhile

# Why an environment that is there cannot be continued, if so.
reason=''
if [[ -d $state ]]; then
  there=$(chosen stack)
  if [[ -n $there && $there != "$stack" ]]; then
    fail "$venv holds the $there stack, and an environment never holds both: name another with VENV="
  elif [[ -e $state/busy ]]; then
    # Without flock, a run that is alive is told by its number.
    other=$(<"$state/busy")
    if ! command -v flock >/dev/null && kill -0 "$other" 2>/dev/null; then
      fail "another run (process $other) is at work on $venv: wait until it ends"
    fi
    reason='an earlier set-up was interrupted while pip was changing it'
  elif ! version=$(python_version "$vpy"); then
    reason='its Python does not run'
  elif [[ $(chosen path) != "$venv" ]]; then
    reason='it was made in another place'
  elif [[ $(chosen torch) != "$torch" || $(chosen torchvision) != "$torchvision" ]]; then
    reason="it was made for torch $(chosen torch)"
  elif [[ -n ${asked_python:-} && $version != "$asked_python" ]]; then
    reason="it was made with Python $version"
  fi
elif [[ -e $venv && -n $(ls -A "$venv" 2>/dev/null || echo x) ]]; then
  fail "$venv is there and was not made by this script: activate it if it holds a stack, remove it, or name another with VENV="
fi

if [[ -n $reason ]]; then
  say "removing $venv to start clean: $reason"
  rm -rf -- "$venv"
fi

# Finds the interpreter and sets `base` to it.
find_python() {
  local candidate version seen='' no_venv=''
  for candidate in "${PYTHON:-python3}" python3.11 python3.12 python3.10 python; do
    # Each is run: a shim of pyenv may be there and fail.
    version=$(python_version "$candidate") || continue
    seen="$seen $version"
    python_fits "$version" || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      base=$candidate
      return
    fi
    no_venv=$version
    [[ -z ${PYTHON:-} ]] || break
  done
  [[ -z $no_venv ]] ||
    fail "Python $no_venv lacks the venv module: install it (Debian: apt-get install python$no_venv-venv)"
  fail "no Python $allowed found (found:${seen:- none}): install one, or name it with PYTHON="
}

# Compiles a line, so that a lack shows before anything large is downloaded.
check_compiler() { # PYTHON
  local standard=-std=c++17 include
  [[ $stack != onedl ]] || standard=-std=c++20
  find_compiler
  include=$("$1" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  printf 'int main() { return 0; }\n' >"$temporary/plain.cpp"
  printf '#include <Python.h>\n#include <vector>\n' >"$temporary/python.cpp"
  "${compiler[@]}" "$standard" -c "$temporary/plain.cpp" -o "$temporary/plain.o" 2>/dev/null ||
    fail "${compiler[*]} cannot compile with $standard: install g++ 11 or newer, or name another compiler with CXX="
  "${compiler[@]}" "$standard" -I"$include" -c "$temporary/python.cpp" \
    -o "$temporary/python.o" 2>/dev/null ||
    fail "the C++ headers of Python $version are missing: install them (Debian: apt-get install python3-dev)"
}
find_compiler() { # sets the array `compiler`, since CXX may be several words
  local candidate
  for candidate in "${CXX:-c++}" g++ clang++; do
    read -ra compiler <<<"$candidate"
    ! command -v "${compiler[0]}" >/dev/null || return 0
    [[ -z ${CXX:-} ]] || fail "CXX=$CXX is not found: name a C++ compiler"
  done
  fail 'no C++ compiler found: install one (Debian: apt-get install g++), or name it with CXX='
}

operators_run() { # with an mmcv of the range asked for
  local report
  report=$(examine "$vpy" "$mmcv") || return 1
  take_report "$report"
  ((${#missing[@]} == 0))
}

make_temporary
if [[ -x $vpy ]]; then
  base=$vpy
else
  find_python
fi
version=$(python_version "$base")
mmcv=$(requirements "$base" "$stack" | grep -E '^(onedl-)?mmcv[<>=]')
tag=$("$base" -c 'import sys; print(sys.implementation.cache_tag)')
key_start=$(tr -s '<>=,' '-' <<<"$mmcv")
operators=no
if [[ -x $vpy ]] && operators_run; then
  operators=yes
elif ! compgen -G \
  "$cache/wheels/${stack}_${key_start}_torch-${torch}*_${tag}_*/*.whl" >/dev/null; then
  check_compiler "$base"
fi

if [[ ! -x $vpy ]]; then
  say "making $venv ($stack stack, Python $version)"
  mkdir -p "$state" || fail "cannot make $venv: name another place with VENV="
  echo $$ >"$state/busy"
  printf '%s\n' "$choice" >"$state/choice"
  "$base" -m venv "$venv" >"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    fail "$base -m venv failed: see above"
  }
  rm -f "$state/busy"
else
  say "continuing with $venv ($stack stack, Python $version)${problem:+: $problem}"
fi
rm -f "$state/done"
# The tools of the environment (ninja among them) before those of the system.
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv"

# 1. torch, and all that must be there before mmcv and the toolkits can be built.
say "1/4 installing torch $torch (downloads several GB, if it is a CUDA build and not there yet)"
plain=()
while IFS= read -r line; do plain+=("$line"); done < <(
  requirements "$vpy" "$stack" | grep -vE '^(onedl-)?mm'
)
change 'torch and the build tools' \
  "torch${torch:+==$torch}" "torchvision${torchvision:+==$torchvision}" \
  "${plain[@]}" wheel ninja packaging psutil

# 2. mmcv with its operators.
key=$(wheel_key "$vpy" "$mmcv") || fail "torch does not import: remove $venv and run this again"
folder=$cache/wheels/$key

take_wheel() { # sets `wheel` to the wheel in the cache; throws a damaged one away
  local file
  wheel=
  for file in "$folder"/*.whl; do
    [[ -f $file ]] || continue
    if wheel_is_good "$vpy" "$file"; then
      wheel=$file
    else
      say "the wheel of mmcv in the cache is damaged: throwing it away"
      rm -f -- "$file"
    fi
  done
}

build_wheel() {
  local jobs memory minutes built
  if [[ $key == *_cuda* ]]; then
    if [[ -z ${CUDA_HOME:-} ]] && ! command -v nvcc >/dev/null &&
      [[ ! -x /usr/local/cuda/bin/nvcc ]]; then
      fail 'torch sees a GPU and nvcc is not found: install the CUDA toolkit of the same version as torch or set CUDA_HOME, or set CUDA_VISIBLE_DEVICES= to build for the CPU alone'
    fi
  fi
  printf '%s' "$temporary" >"$folder/building"

  check_compiler "$vpy"
  cat >"$temporary/c++" <<'SH'
#!/bin/sh
# The headers of torch ask for C++20 and mmcv for C++17: the last one given counts.
exec $CONVMLP_MM_CXX "$@" -std=c++20
SH
  chmod +x "$temporary/c++"
  export CXX="${compiler[*]}"
  if [[ $stack == onedl ]]; then
    export CONVMLP_MM_CXX=$CXX
    CXX=$temporary/c++
    export NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:+$NVCC_APPEND_FLAGS }-std=c++20"
  fi
  # One job takes up to a gigabyte.
  jobs=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  memory=$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo 2>/dev/null || true)
  ((${memory:-$jobs} >= jobs)) || jobs=$((memory > 0 ? memory : 1))
  export MAX_JOBS=${MAX_JOBS:-$jobs}
  minutes=$(((stack_minutes + MAX_JOBS - 1) / MAX_JOBS))
  [[ $key != *_cuda* ]] || minutes="$minutes to $((minutes * 4))"
  say "2/4 compiling the operators of mmcv, once: about $minutes minutes with $MAX_JOBS jobs"

  # pip's own cache is not used: a wheel there may have been made for another torch,
  # or without operators.
  MMCV_WITH_OPS=1 TMPDIR=$temporary pip_run "$vpy" wheel --no-deps --no-cache-dir \
    --no-build-isolation -w "$temporary/wheel" "$mmcv" ||
    explain_pip 'the compilation of mmcv'
  built=$(compgen -G "$temporary/wheel/*.whl" | head -n 1)
  wheel_is_good "$vpy" "$built" ||
    fail "mmcv was built without its operators: see $log"
  keep_wheel "$built"
  rm -f -- "$folder/building"
}

keep_wheel() { # WHEEL: it appears in the cache whole or not at all
  cp -- "$1" "$folder/partial"
  mv -- "$folder/partial" "$folder/$(basename "$1")"
}

# The build of a killed run: pip, which had the lock, may have come to its end.
take_over() {
  local left file
  left=$(cat "$folder/building" 2>/dev/null) || return 0
  [[ $left == */convmlp_mm-build.?????? ]] || return 0
  for file in "$left"/wheel/*.whl; do
    ! wheel_is_good "$vpy" "$file" || keep_wheel "$file"
  done
  rm -rf -- "$left" "$folder/building"
}

stack_minutes=20 # of one core
[[ $stack == onedl ]] || stack_minutes=10
wheel=
if [[ $operators == yes ]]; then
  say '2/4 the operators of mmcv are there'
else
  mkdir -p "$folder" || fail "cannot write to $cache: set XDG_CACHE_HOME"
  lock 9 "wheel-$(cksum <<<"$key" | tr ' ' -)" 'the operators of mmcv'
  take_over
  take_wheel
  if [[ -n $wheel ]]; then
    say '2/4 taking the operators of mmcv from the cache'
  else
    build_wheel
    take_wheel
  fi
  if command -v flock >/dev/null; then
    exec 9>&-
  fi
  # By force, since pip takes a wheel of the same version for the one that is there.
  change mmcv --no-deps --force-reinstall "$wheel"
fi

# 3. The toolkits, the project and the extras. torch stays what it is.
say '3/4 installing the toolkits and convmlp_mm: about a minute'
installed "$vpy" 'torch|torchvision|(onedl-)?mmcv' >"$temporary/constraints.txt"
extras=$stack
for extra in "$@"; do extras=$extras,$extra; done
cd "$root"
change 'the toolkits' --no-build-isolation -c "$temporary/constraints.txt" \
  -e ".[$extras]"

# opencv-python needs libraries of a desktop that a server lacks. Its headless twin has
# the same files, and laid over it keeps pip content.
if ! words=$("$vpy" -c 'import cv2' 2>&1) &&
  [[ $words == *'cannot open shared object file'* ]]; then
  say 'no desktop libraries here: using OpenCV without windows'
  opencv=$(installed "$vpy" opencv-python)
  change OpenCV --no-deps --force-reinstall "${opencv/python/python-headless}"
fi

# 4. Does it run?
say '4/4 checking'
works "$@" || fail "the environment does not work ($problem): remove $venv and $folder, then run this again"
((${#missing[@]} == 0)) || fail "pip did not install ${missing[*]}: see $log"
"$vpy" -c 'import convmlp_mm, mmdet, mmpretrain, mmseg' >>"$log" 2>&1 || {
  tail -n 3 "$log" >&2
  fail "the toolkits do not import together: see above and $log"
}
printf '%s\n' "$choice" >"$state/choice"
printf '%s' "$checksum" >"$state/done"
finish "$vpy" "$venv is ready after $((SECONDS - started)) s ($stack stack, torch $seen_torch)"
