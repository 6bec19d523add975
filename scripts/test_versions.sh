#!/usr/bin/env bash
# The tests that touch transformers most, against the oldest release that setup.py admits and the newest there is.
# constraints.txt pins one release for everything else; a rename in a new one is seen here on its day.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh dev

TESTS=(tests/model/test_apply.py tests/model/test_fused.py tests/model/test_attention_function.py tests/model/test_model.py tests/model/test_model_zoo.py
       tests/model/test_kinds.py)
TESTS+=(tests/training/test_trainer.py tests/engine/test_trial.py)

version_of() { # what pip would take for a requirement such as "transformers<6"
    python -m pip install -qq --dry-run --ignore-installed --no-deps --report - "$1" |
        python -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])'
}

test_against() { # a release
    local where=".venv/transformers-$1"
    if [ "$1" = "$(python -c 'import transformers; print(transformers.__version__)')" ]; then
        echo "[test] transformers $1 is the one that constraints.txt pins: scripts/test.sh tests it"
        return 0
    fi
    # In a folder of its own, in front of the environment's packages: torch and the others are shared.
    if [ ! -d "$where" ]; then
        python -m pip install -qq --disable-pip-version-check --target "$where.part" "transformers==$1"
        mv "$where.part" "$where"
    fi
    echo "[test] pytest with transformers $1"
    PYTHONPATH="$where" python -m pytest -q -n 2 --dist worksteal "${TESTS[@]}"
}

range="$(grep -o 'transformers>=[^"]*' setup.py)" # transformers>=5.17,<6
oldest="${range%%,*}"
test_against "$(version_of "transformers==${oldest#*>=}.*")"
test_against "$(version_of "$range")"
