#!/bin/sh
# Makes .venv-peers, an environment for tools that are run against the service and whose pins do not go with ours.
# Does nothing when it is ready. PYTHON names the interpreter to start from (default python3).
set -eu
cd "$(dirname "$0")/.."

venv=.venv-peers
wanted="guidellm==0.8.1"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
stamp=$venv/.kvsluice-ready

[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
printf 'setup: installing %s (with libraries of its own: some hundred megabytes)\n' "$wanted"
"$venv/bin/python" -m pip -qq install "$wanted"
printf '%s' "$wanted" > "$stamp"
