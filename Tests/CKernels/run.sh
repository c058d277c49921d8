#!/bin/sh
# Builds and runs the check of the C kernels: plainly, with sanitizers, and for arm64 under qemu where that is
# installed. `./run.sh bench` builds and runs the benchmark instead.
set -e
cd "$(dirname "$0")"
CC=${CC:-clang}
OUT=${OUT:-$(mktemp -d)}
SOURCES="$(ls ./*.c ../../Sources/CKVKernels/*.c)"
FLAGS="-std=gnu17 -Wall -Wextra -Werror -I../../Sources/CKVKernels/include"

echo "== plain"
# shellcheck disable=SC2086
$CC $FLAGS -O2 $SOURCES -o "$OUT/harness" -lpthread -lm
if [ "$1" = bench ]; then
  shift
  exec "$OUT/harness" bench "$@"
fi
"$OUT/harness" check "$@"

echo "== address and undefined behaviour sanitizers"
if $CC -fsanitize=address,undefined -x c /dev/null -S -o /dev/null 2>/dev/null &&
  echo 'int main(void) { return 0; }' | $CC -fsanitize=address,undefined -x c - -o "$OUT/probe" 2>/dev/null; then
  # shellcheck disable=SC2086
  $CC $FLAGS -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all $SOURCES \
    -o "$OUT/harness-san" -lpthread -lm 2>"$OUT/link.log" || { cat "$OUT/link.log"; exit 1; }
  "$OUT/harness-san" check "$@"
else
  echo "skipped: this compiler has no sanitizer runtime"
fi

echo "== arm64 under qemu"
if [ "$(uname -m)" != aarch64 ] && command -v qemu-aarch64 >/dev/null && [ -d /usr/aarch64-linux-gnu ]; then
  # shellcheck disable=SC2086
  $CC --target=aarch64-linux-gnu $FLAGS -O2 -static $SOURCES -o "$OUT/harness-arm64" -lpthread -lm
  qemu-aarch64 "$OUT/harness-arm64" check
else
  echo "skipped: needs qemu-user, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross on another architecture"
fi
