#!/usr/bin/env bash
# Fetches the published files that Neon's programs open: `neon download`, which takes the flags; see --help.
neon=$(dirname "$0")/.venv/bin/neon # `make` installs it there
[ -x "$neon" ] || neon=$(dirname "$0")/neon # and pip beside this script
[ -x "$neon" ] || neon=$(command -v neon) ||
    { echo "download_models.sh: neon is not installed; run \`pip install -e .\` in the checkout" >&2 && exit 2; }
exec "$neon" download "$@"
