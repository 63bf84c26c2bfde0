#!/usr/bin/env bash
# Makes the pictures of the editor in this folder: the quickstart as it trains, on a display that is only memory.
# Needs Xvfb and Mesa (Debian: apt-get install xvfb libgl1-mesa-dri libegl1 libxkbcommon-x11-0), and some minutes.
#
#     cargo build --release && docs/screenshots.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
repo=$(dirname "$here")
hadal=${HADAL:-$repo/target/release/hadal}
seconds=${SECONDS_OF_TRAINING:-240}
command -v Xvfb >/dev/null || { echo 'missing: Xvfb (Debian: apt-get install xvfb)' >&2; exit 1; }
[[ -x $hadal ]] || { echo "missing: $hadal; build it with cargo build --release, or name another in HADAL" >&2; exit 1; }

work=$(mktemp -d)
exec 3> >(cat >"$work/display")
Xvfb -displayfd 3 -screen 0 2600x1500x24 -nolisten tcp >/dev/null 2>&1 &
server=$!
trap 'kill "$server"; rm -rf "$work"' EXIT
while [[ ! -s $work/display ]]; do sleep 0.1; done
DISPLAY=:$(<"$work/display")
export DISPLAY LIBGL_ALWAYS_SOFTWARE=1 HOME=$work XDG_DATA_HOME=$work
unset WAYLAND_DISPLAY

# Runs go to a folder that is thrown away, and pictures name no folder of this machine.
cp -r "$repo/scenes" "$work"
cd "$work"
shot() { "$hadal" editor "$@" --size 1280x720; }
shot scenes/quickstart.ron --run --theme dark --after "$seconds" --screenshot "$here/editor-quickstart.png"
shot scenes/quickstart.ron runs/quickstart --theme light --view Routing --after 8 --screenshot "$here/editor-routing.png"
shot scenes/pipeline.ron --run --theme light --after 14 --screenshot "$here/editor-pipeline.png"
shot scenes/deepseek_v3.ron --theme dark --view Scene --after 20 --screenshot "$here/editor-plan.png"
echo "wrote $here/editor-*.png"
