# Sourced by run_train.sh and run_tests.sh: finds a Python that has titan_hd's dependencies, or makes .venv.
#   setup_environment ROOT [EXTRA]    sets PYTHON and PYTHONPATH; EXTRA is an extra of pyproject.toml that a new .venv
#                                     gets, such as dev; what dev has is looked for in an environment that is there, too

setup_environment() {
  local root=$1 extra=${2:-}
  local packages="torch numpy safetensors sentencepiece tokenizers tiktoken jinja2 tqdm torchdata filelock wandb"
  [ "$extra" != dev ] || packages="$packages pytest pytest_timeout hypothesis transformers peft huggingface_hub gguf accelerate
    pyarrow zstandard matplotlib scipy ruff importlinter codespell_lib pyrefly mkdocs material"
  # They are looked for, not imported, which would take seconds at every start.
  local complete="from importlib import metadata, util
assert (2, 11) <= tuple(map(int, metadata.version('torch').split('.')[:2])) < (2, 14)
assert all(map(util.find_spec, '''$packages'''.split()))"
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  if [ ! -f "$root/pyproject.toml" ]; then # in a wheel, which pip has installed with what it needs
    PYTHON=${PYTHON:-python3}
    return
  fi
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} "$root/.venv/bin/python" python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$complete" 2>/dev/null; then
      PYTHON=$candidate
      return
    fi
  done
  echo "titan_hd: installing its dependencies into $root/.venv" >&2
  [ -x "$root/.venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$root/.venv"
  "$root/.venv/bin/python" -m pip install --quiet --editable "$root${extra:+[$extra]}" >&2
  PYTHON="$root/.venv/bin/python"
}
