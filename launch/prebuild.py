"""Build DeepSpeed's shared-memory communication kernel before anyone waits for it.

On CPU every rank loads ``deepspeed_shm_comm``, which torch compiles on first use (45 to 140 s) and caches for each
user in ``~/.cache/torch_extensions``; an environment at another path compiles it again. Left alone, that first use is
inside the first training run, in silence. So ``make setup`` calls this: it compiles the kernel, says so, and writes
where it lies to ``--stamp``, which lets make see later whether the cache still holds it. On an accelerator other than
the CPU there is nothing to build.

A build that was killed leaves torch's lock file behind, and every later process would wait for it for ever; a lock
that no process holds open is removed here. (A home directory shared by machines that build at the same moment can
fool this check; give each its own ``TORCH_EXTENSIONS_DIR`` then.)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from launch.environment import name_accelerator
from launch.files import write_atomically
from launch.settings import EXIT_FAILED, EXIT_FINISHED


def is_held_open(path: Path) -> bool:
    """Whether a process of this machine, among those we may look into, has ``path`` open."""
    target = path.resolve()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if Path(os.readlink(link)) == target:
                return True
        except OSError:  # the process ended, or belongs to someone else
            continue
    return False


def remove_stale_lock(build_directory: Path) -> bool:
    """Delete the lock that a killed build left in ``build_directory``; whether there was one."""
    lock = build_directory / "lock"
    if not lock.exists() or is_held_open(lock):
        return False
    lock.unlink(missing_ok=True)
    return True


def build_communication_kernel() -> Path:
    """Compile and load the kernel where this machine uses it; the file that proves that it is there.

    Raises whatever the compiler's failure raises (``RuntimeError``, ``subprocess.CalledProcessError``).
    """
    name_accelerator()
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.utils import cpp_extension

    accelerator = get_accelerator()
    name = accelerator.device_name()
    if name != "cpu":
        print(f"set-up: the accelerator is {name}; the CPU communication kernel is not needed", flush=True)
        return Path(deepspeed.__file__)
    builder = accelerator.create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        print("set-up: this platform has no shared-memory communication kernel; ranks will use gloo alone", flush=True)
        return Path(deepspeed.__file__)
    directory = Path(cpp_extension._get_build_directory(builder.name, verbose=False))
    library = directory / f"{builder.name}.so"
    if remove_stale_lock(directory):
        print("set-up: removed the lock of a build that was interrupted", flush=True)
    print("set-up: the CPU communication kernel (compiling takes 1 to 2 minutes, once for an environment)", flush=True)
    start = time.monotonic()
    builder.load()
    print(f"set-up: the CPU communication kernel is ready ({time.monotonic() - start:.0f} s)", flush=True)
    return library


def main() -> int:
    """Build, then write the stamp; one line on failure, after the compiler's own words."""
    parser = argparse.ArgumentParser(description="Build DeepSpeed's CPU communication kernel ahead of its first use.")
    parser.add_argument("--stamp", type=Path, help="file that receives the path of what was built")
    arguments = parser.parse_args()
    try:
        built = build_communication_kernel()
    except Exception as error:  # the compiler can fail in as many ways as there are machines; say what it needs
        print(f"{error}\n", file=sys.stderr)
        print(
            "error: DeepSpeed's CPU communication kernel did not compile; it needs a C++20 compiler with OpenMP "
            "(Debian: g++) and Python's headers (Debian: python3-dev)",
            file=sys.stderr,
        )
        return EXIT_FAILED
    if arguments.stamp is not None:
        write_atomically(arguments.stamp, f"{built}\n".encode())
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main())
