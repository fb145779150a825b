"""A folder that a demo makes: whole or not there, reused when made with the same settings, never over someone's own.

The last of its files holds the settings; it is the first to go and the last to come.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from kit.paths import check_writable


def make(out, files, settings, *, source, write):
    """Makes folder `out` by write(folder, fingerprint) unless it is there; what that returned, or None if reused.

    files: names of what it holds, the JSON file of settings last; source: the files that make it, whose bytes count as
    settings. ValueError, before any work, where `out` is a file, or holds one of `files` but not the last.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; name a folder")
    check_writable(out / files[-1])
    present = [name for name in files if (out / name).exists()]
    if present and files[-1] not in present:
        raise ValueError(
            f"--out {out}: holds {present[0]} but no {files[-1]}; name another folder, or remove it"
        )
    code = b"".join(Path(file).read_bytes() for file in source)
    fingerprint = hashlib.sha256(json.dumps(settings).encode() + code).hexdigest()
    models = [name for name in files if (out / name).is_dir()]
    parts = [
        *files,
        *(f"{name}/{file}" for name in models for file in ("model.safetensors", "tokenizer.json")),
    ]
    if (
        all((out / part).exists() for part in parts)
        and fingerprint.encode() in (out / files[-1]).read_bytes()
    ):
        print(f"{out}: reused, made earlier with the same settings")
        return None
    if (out / files[-1]).exists():
        print(
            f"{out}: made with other settings or another version of this software; making it again"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        result = write(Path(temporary), fingerprint)
        move_into(out, Path(temporary), files)
    return result


def move_into(out, folder, files):
    """Replace `files` in `out` by those of `folder`; other files stay."""
    out.mkdir(exist_ok=True)
    (out / files[-1]).unlink(missing_ok=True)
    for name in files:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (folder / name).replace(out / name)
