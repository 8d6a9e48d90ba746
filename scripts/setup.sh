#!/usr/bin/env bash
# Sets a machine up for this repository. Called by make; both steps are cheap when nothing changed.
#
#   setup.sh install   makes the virtual environment $VENV (.venv), or brings it up to date
#   setup.sh gl        checks that headless OpenGL draws, installs the Debian packages if it may
#
# PYTHON names the interpreter to use; RLLIB_DREAMER_APT=0 forbids calling apt-get.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
LOG=$VENV/setup.log
STAMP=$VENV/.rllib_dreamer_setup
GL_PACKAGES=(libegl1 libgl1 libgl1-mesa-dri libegl-mesa0 libglib2.0-0)
BUILD_PACKAGES=(gcc python3-dev linux-libc-dev)
IS_SUPPORTED='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'

say() { printf '%s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The one line that a person types to install Debian packages.
apt_line() {
    local sudo='sudo '
    ((EUID != 0)) || sudo=''
    say "${sudo}apt-get update && ${sudo}apt-get install -y --no-install-recommends $*"
}

# Installs Debian packages if this user may; returns non-zero, quietly, if not.
apt_install() {
    [[ ${RLLIB_DREAMER_APT:-1} != 0 ]] && command -v apt-get >/dev/null || return 1
    local as_root=()
    if ((EUID != 0)); then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null || return 1
        as_root=(sudo)
    fi
    say "Installing $* ..."
    "${as_root[@]}" apt-get update -qq >/dev/null &&
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.10)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c "$IS_SUPPORTED" >/dev/null 2>&1; then
            say "$candidate"
            return
        fi
    done
    fail "no Python 3.10, 3.11 or 3.12 among ${candidates[*]}: install one, or name it with" \
        "\`make PYTHON=/path/to/python3.11\`"
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Whether the environment is of the version that PYTHON names, if it names one.
is_of_wanted_python() {
    local wanted
    [[ -n ${PYTHON:-} ]] || return 0
    wanted=$(version_of "$PYTHON") && [[ $(version_of "$VENV/bin/python") == "$wanted" ]]
}

make_venv() {
    if "$VENV/bin/python" -c "$IS_SUPPORTED" 2>/dev/null &&
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && is_of_wanted_python; then
        return
    fi
    local python version
    python=$(find_python)
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$(version_of "$python")
        apt_install "python$version-venv" ||
            fail "$python has no venv and pip; type: $(apt_line "python$version-venv")"
    fi
    say "Making $VENV with $("$python" --version 2>&1) ..."
    "$python" -m venv --clear "$VENV"
}

# A digest of everything that decides what is installed: changed means install again.
fingerprint() {
    "$VENV/bin/python" - <<'PYTHON'
import hashlib, pathlib, re, sys

version = re.search(r'^__version__.*$', pathlib.Path("rllib_dreamer/__init__.py").read_text(), re.M)
parts = [pathlib.Path(name).read_text() for name in ("pyproject.toml", "constraints.txt")]
parts += [version.group() if version else "", sys.version, str(pathlib.Path.cwd())]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

pip_install() {
    "$VENV/bin/python" -m pip install --progress-bar off "$@" >>"$LOG" 2>&1
}

install_failed() {
    tail -n 20 "$LOG" >&2
    fail "pip could not install $1; its whole output is in $LOG"
}

install_package() {
    local target=(-c constraints.txt -e '.[all,dev]')
    pip_install "${target[@]}" && return
    # robosuite pulls evdev, which is compiled here: it needs a C compiler and the kernel's headers.
    grep -qiE '(failed|error).*evdev|evdev.*(failed|error)' "$LOG" || install_failed "this package"
    apt_install "${BUILD_PACKAGES[@]}" ||
        fail "evdev (needed by robosuite) has to be compiled; type:" \
            "$(apt_line "${BUILD_PACKAGES[@]}")"
    pip_install "${target[@]}" || install_failed "this package"
}

install() {
    make_venv
    local wanted torch
    wanted=$(fingerprint)
    [[ ! -f $STAMP || $(<"$STAMP") != "$wanted" ]] || return 0
    rm -f "$STAMP"
    : >"$LOG"
    torch=$(grep -E '^torch==' constraints.txt)
    say "Installing $torch ... (pip's output: $LOG)"
    pip_install "$torch" || install_failed "$torch"
    say "Installing rllib_dreamer with all extras ... (a few minutes the first time)"
    install_package
    say "$wanted" >"$STAMP"
    say "Installed. \`source $VENV/bin/activate\` puts \`rllib\` on the path."
}

gl() {
    "$VENV/bin/python" scripts/check_headless_gl.py && return
    [[ $(uname -s) == Linux && -z ${MUJOCO_GL:-} ]] || exit 1
    if apt_install "${GL_PACKAGES[@]}"; then
        "$VENV/bin/python" scripts/check_headless_gl.py && return
        fail "OpenGL still does not draw after installing ${GL_PACKAGES[*]}:" \
            "see docs/headless_rendering.md"
    fi
    fail "headless OpenGL is missing; on Debian or Ubuntu type: $(apt_line "${GL_PACKAGES[@]}")"
}

case ${1:-} in
    install) install ;;
    gl) gl ;;
    *) fail "usage: scripts/setup.sh install|gl" ;;
esac
