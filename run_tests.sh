#!/usr/bin/env bash
# Sets up what the tests need and runs all of them (but those marked slow or gpu):  ./run_tests.sh [pytest options]
# Slow ones: ./run_tests.sh -m slow      On a GPU: ./run_tests.sh -m gpu
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"
source tools/environment.sh
setup_environment "$PWD" dev
exec "$PYTHON" -m pytest "$@"
