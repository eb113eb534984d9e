#!/bin/sh
# Regenerates kvrelay/wire from proto/, and removes what no .proto stands behind any more.
# Usage: proto/generate.sh [OUTPUT]   OUTPUT is an existing folder; without it, the repository itself.
# `proto/check.sh` (in `make check`) fails when the result differs from what is committed.
set -eu
out=$(cd "${1:-"$(dirname "$0")/.."}" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

"$python" -m grpc_tools.protoc -Ikvrelay/wire=proto \
    --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" proto/*.proto

for file in "$out"/kvrelay/wire/*_pb2*; do
    name=$(basename "$file")
    source=proto/${name%%_pb2*}.proto
    case $name in
        # protoc writes a stub file even for a .proto without services.
        *_pb2_grpc.py) grep -qs '^service ' "$source" || rm "$file" ;;
        *) [ -f "$source" ] || rm "$file" ;;
    esac
done
