#!/bin/sh
# Regenerates kvrelay/wire from proto/. `make check` fails when the result differs from what is committed.
set -eu
cd "$(dirname "$0")/.."
for name in inference transfer worker control; do
    "${PYTHON:-python}" -m grpc_tools.protoc -Ikvrelay/wire=proto \
        --python_out=. --pyi_out=. --grpc_python_out=. "proto/$name.proto"
done
# A file without services needs no stubs.
rm -f kvrelay/wire/transfer_pb2_grpc.py
