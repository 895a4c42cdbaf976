"""Compiled functions kept on disk, so that the next process need not compile them.

JAX's persistent compilation cache with the settings that a small model wants, in a
folder of its own for each jaxlib and each kind of processor: code made for one does not
run on another, and XLA only finds out after loading it.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform

import jax

from minillm_jax.validation import ConfigError


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keeps what is compiled from now on; call it before the first compilation.

    Whoever can write to the folder can run code as whoever reads it: it is made for its
    owner alone, and one that others may write to is refused.

    Args:
      folder: None is `minillm_jax` in the user's cache folder (`XDG_CACHE_HOME`).

    Returns:
      The folder of this jaxlib and machine in it.

    Raises:
      ConfigError: if it cannot be made or written to, or others can write to it.
    """
    if folder is not None and not os.fspath(folder):
        raise ConfigError("compilation_cache='': give a folder")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    root = home / "minillm_jax" if folder is None else pathlib.Path(folder)
    try:
        root = root.expanduser().absolute()
        root.parent.mkdir(parents=True, exist_ok=True)
        path = root / machine_key()
        for made in (root, path):
            made.mkdir(mode=0o700, exist_ok=True)
            _check_own(made)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such user's home
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"compilation_cache={root}: cannot be made: {said}; give another folder"
        ) from None
    if not os.access(path, os.W_OK):
        raise ConfigError(f"compilation_cache={root}: cannot be written; give another")
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return path


def _check_own(folder: pathlib.Path) -> None:
    """Raises ConfigError where others could put code into a folder."""
    if os.name != "posix":
        return
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise ConfigError(
            f"compilation_cache={folder}: is another user's; give another"
        )
    if found.st_mode & 0o022:
        raise ConfigError(
            f"compilation_cache={folder}: others may write there, and could make you "
            "run their code; take that right from them (chmod go-w), or give another"
        )


def machine_key() -> str:
    """`jaxlib-VERSION-MACHINE-DIGEST`, the digest of the processor's features."""
    version = importlib.metadata.version("jaxlib")
    digest = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return f"jaxlib-{version}-{platform.machine()}-{digest}"


def _processor() -> str:
    """What tells this kind of processor from others."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.platform()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
