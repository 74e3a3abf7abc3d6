#!/usr/bin/env bash
# Sets up what the tests need and runs all of them (but those marked slow or gpu):  ./run_tests.sh [pytest options]
# Slow ones: ./run_tests.sh -m slow      On a GPU: ./run_tests.sh -m gpu
# Without options they run in two lanes side by side (tests/kit/lanes.py), with options in one.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
source tools/environment.sh
setup_environment "$PWD" dev
[ $# -gt 0 ] || exec "$PYTHON" -m tests.kit.lanes
exec "$PYTHON" -m pytest "$@"
