# Makes the repository's own environment in .venv and activates it. Source it from another script:
#
#     source "$(dirname "$0")/env.sh" dev         # extras of setup.py, comma separated; "" for none
#
# Always give the argument: without one, `source` hands on the calling script's own arguments.
# PYTHON=python3.12 picks the interpreter. HF_FPDT_NO_VENV=1 installs nothing and uses the Python that is
# active, for containers that bring their own CUDA build of torch.

_fpdt_say() { echo "[env] $*" >&2; }

_fpdt_fail() {
    _fpdt_say "error: $*"
    return 1
}

_fpdt_check_python() {
    command -v "$1" >/dev/null || _fpdt_fail "no '$1' found; set PYTHON to a Python 3.10 or newer" || return 1
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        _fpdt_fail "$("$1" --version) is too old; set PYTHON to a Python 3.10 or newer"
}

_fpdt_make_venv() {
    local root="$1" python="${PYTHON:-python3}"
    # A .venv whose interpreter went away (an upgrade, a copied folder) cannot be repaired in place.
    if "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then return 0; fi
    _fpdt_check_python "$python" || return 1
    _fpdt_say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear "$root/.venv" ||
        _fpdt_fail "'$python -m venv' failed; on Debian or Ubuntu: apt install python3-venv"
}

_fpdt_install() {
    local root="$1" extras="$2" what="${2:+[$2]}" stamp want began=$SECONDS
    stamp="$root/.venv/.installed-${extras//,/-}"
    want="$("$root/.venv/bin/python" - "$root/setup.py" "$root/constraints.txt" <<'PY'
import hashlib
import sys

data = b"".join(open(path, "rb").read() for path in sys.argv[1:])
print(hashlib.sha256(data + sys.prefix.encode()).hexdigest())
PY
)" || return 1
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
        _fpdt_say "hf_fpdt$what is installed and up to date"
        return 0
    fi
    _fpdt_say "installing hf_fpdt$what into .venv; the first time takes a few minutes, torch is large"
    # Twice quiet: once still prints a warning for every index or folder that pip's own settings name in vain.
    (cd "$root" && .venv/bin/python -m pip install -qq --disable-pip-version-check \
        -c constraints.txt -e ".$what") || _fpdt_fail "pip could not install hf_fpdt$what" || return 1
    echo "$want" >"$stamp"
    _fpdt_say "installed in $((SECONDS - began)) s"
}

_fpdt_env() {
    local root extras="${1-dev}"
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    if [ -n "${HF_FPDT_NO_VENV:-}" ]; then
        _fpdt_say "using the active Python: $(command -v python)"
        return 0
    fi
    [[ "$extras" =~ ^[a-z,]*$ ]] || _fpdt_fail "'$extras' is no list of extras (see the head of env.sh)" || return 1
    _fpdt_make_venv "$root" && _fpdt_install "$root" "$extras" || return 1
    # shellcheck disable=SC1091
    source "$root/.venv/bin/activate"
}

_fpdt_env "$@"
