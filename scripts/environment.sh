# Sourced by the other scripts: makes .venv once, and again only when pyproject.toml has changed.
# PYTHON names another interpreter than python3.

PYTHON="${PYTHON:-python3}"

ensure_environment() { # $1: extras, such as [test]
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $PYTHON is missing or older than Python 3.10. Install Python 3.10 or newer, or set PYTHON=/path/to/it." >&2
        exit 2
    fi
    wanted="$(cksum < pyproject.toml) $1"
    if [ -x .venv/bin/qlora ] && grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        return
    fi
    if [ ! -x .venv/bin/python ] && ! "$PYTHON" -m venv .venv; then
        echo "error: $PYTHON cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv." >&2
        exit 2
    fi
    echo "Installing into .venv (once; PyTorch is the largest part) ..." >&2
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1"
    echo "$wanted" >> .venv/installed
}
