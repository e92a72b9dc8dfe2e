"""Writes the C source of `eptransport._native` from the public headers: they are the cdef, so Python can't disagree."""

import re
import sys
from pathlib import Path

from cffi import FFI

HEADERS = ("backend.h", "metrics.h", "eptransport.h", "gpu.h")

# What a waiting native thread asks Python: see _call.py.
CALLBACKS = 'extern "Python" int32_t ept_python_interrupted(void *);'

# ept_engine_write with numbers for a struct: to make one and set its fields from Python costs more than the write.
WRITE = "int32_t ept_python_write({})".format(
    "ept_engine *engine, uint32_t peer, ept_memory_id source, uint64_t source_offset, ept_region_id destination, "
    "uint64_t destination_offset, uint64_t length, ept_remote_signal_id signal, ept_transfer_id *transfer, "
    "ept_error *error"
)
WRITE_BODY = """ {
  const ept_write write = {
      sizeof write, peer, source, source_offset, destination, destination_offset, length, signal,
  };
  return ept_engine_write(engine, &write, transfer, error);
}
"""


def cdef_of(header: Path) -> str:
    """A header as cffi reads it: no directives but integer constants, no linkage blocks."""
    text = header.read_text()
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif\n", "", text, flags=re.S)
    lines = []
    for line in text.splitlines():
        if line.startswith("#"):
            if re.fullmatch(r"#define EPT_\w+ \d+", line):
                lines.append(line)
            continue
        lines.append(line)
    return "\n".join(lines)


def main(include: str, output: str) -> None:
    ffi = FFI()
    for name in HEADERS:
        ffi.cdef(cdef_of(Path(include) / "eptransport" / name))
    ffi.cdef(f"{CALLBACKS}\n{WRITE};")
    ffi.set_source("eptransport._native", f'#include "eptransport/gpu.h"\nstatic {WRITE}{WRITE_BODY}')
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
