# What both scripts of this folder need, sourced from the root of the project: a virtual environment outside of the clone, and Chromium
# where it can be had. Sets $python.
venv="${XDG_CACHE_HOME:-$HOME/.cache}/hadal/venv-serve"
python="$venv/bin/python"
if ! "$python" -c 'import jinja2, openai, playwright' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet -r tests/serve/requirements.txt
fi
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [[ $(id -u) == 0 ]]; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 || true
fi

# The chat page of a server: chat_page URL [arguments].
chat_page() {
    if command -v chromium >/dev/null; then
        "$python" tests/serve/chat_page.py "$@"
    else
        echo '!! no chromium: the chat page is NOT tested; apt-get install chromium' >&2
    fi
}
