#!/bin/sh
# Make a virtual environment with the locked versions:  sh install.sh .venv
# With an NVIDIA GPU, torch is the package index's default build (CUDA). Without one it is the CPU build
# where pip is configured to find it (a wheel folder or PyTorch's own CPU index in PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL); otherwise the default build, which also runs on a CPU but is a larger download.
set -eu
venv=${1:-.venv}
python=${PYTHON:-python3}
torch=2.13.0

"$python" -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else
    f"nightshift needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.12 setup")'
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
    echo "cannot make a virtual environment in $venv; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

if "$venv/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
    echo "torch $torch is there"
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    echo "installing torch $torch for CUDA (a few GB)"
    PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= pip install "torch==$torch"
elif [ "$(uname -s)" = Darwin ]; then
    pip install "torch==$torch"
elif pip install "torch==$torch+cpu" 2>/dev/null; then
    echo "installed torch $torch for the CPU"
else
    echo "pip finds no CPU build of torch $torch; installing the default build (a few GB). For a smaller one,"
    echo "set PIP_EXTRA_INDEX_URL to PyTorch's CPU index (see its installation page) and run this again."
    pip install "torch==$torch"
fi
echo "installing the locked versions"
pip install -r requirements.lock
pip install --no-deps --no-build-isolation -e .
"$venv/bin/python" -c 'import torch; print("torch", torch.__version__, "on", "CUDA" if torch.cuda.is_available() else "the CPU")'
if command -v nvidia-smi >/dev/null 2>&1 && "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then
    echo "note: this machine has an NVIDIA GPU, but pip chose a build of torch without CUDA: check pip's find-links" >&2
fi
