"""Folders that appear complete or not at all.

A folder is written in a temporary one, flushed to disk, described by manifest.json (size and sha256 of every file)
and then renamed. A crash at any moment leaves the folders committed before it. The checksums find damage, not
tampering.

Only what a run made is deleted, and it shows by its content: a temporary folder holds OWNER, a committed one a
manifest of the form written here, of which the listed files go that have the listed size. Everything else is left
alone, or renamed where it is in the way; so is what cannot be looked into.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from . import distributed, files
from .config import UserError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
OWNER = ".made-by-python-trainer"  # an empty file in a temporary folder
STUMP = re.compile(re.escape(TEMPORARY) + "(.+)-[0-9a-f]{8}")  # the name of one, with that of what it is for
SHA256 = re.compile("[0-9a-f]{64}")
NEW, OLD, DISCARDED = "new", "old", "discarded"  # in a temporary folder


@contextlib.contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """A place to write; on leaving the block it becomes `folder`, replacing what a run had left there."""
    work = _temporary(folder, distributed.gather_objects(secrets.token_hex(4))[0])
    try:
        if distributed.is_main():
            begin(work)
        distributed.barrier()
        yield work / NEW
        distributed.barrier()
        _commit(work, folder)
        distributed.barrier()
    except Exception as error:
        obstacle = _obstacle(folder.parent)  # asked before the stump makes room again
        if distributed.is_main():  # another rank may have failed alone, with the first still at work there
            with contextlib.suppress(OSError):
                clear(work)
        if obstacle is None:
            raise
        raise UserError(
            f"{folder} could not be written: {obstacle}. What was there before is as it was; free some space, "
            "or set output_dir to another disk, or lower save_total_limit"
        ) from error


def verify(folder: Path) -> list[str]:
    """Refuse a folder that is incomplete or whose bytes are not those that were written.

    Returns the names of its files: whoever reads it reads these and no others.
    """
    if not (folder / MANIFEST).is_file():  # a pipe would make it wait
        raise UserError(f"{folder} is not complete: it has no {MANIFEST}")
    try:
        listed = _listed(folder)
    except ValueError as error:
        raise UserError(f"{folder / MANIFEST} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    for name, (expected, _) in listed.items():
        path = folder / name
        size = path.stat().st_size if files.is_plain(path) and _is_inside(folder, name) else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes"
            raise UserError(f"{folder} refused: {path} {found}, expected {expected} bytes")
    try:
        found_now = _checksums(folder, {name: size for name, (size, _) in listed.items()})
    except OSError as error:
        raise UserError(f"{folder} refused: {error.filename or 'a file'}: {error.strerror}") from error
    for name, (_, sha256) in listed.items():
        if found_now[name] != sha256:
            raise UserError(f"{folder} refused: the content of {folder / name} has changed since it was written")
    return list(listed)


def refuse_unlisted(folder: Path, readable: Callable[[str], bool]) -> None:
    """For a library that reads whatever it finds: of the names that it looks for, there are those of the manifest."""
    listed = {*verify(folder), MANIFEST}
    others = [path for path in folder.iterdir() if path.name not in listed and readable(path.name)]
    if others:
        raise UserError(
            f"{folder} refused: {min(others)} is {files.kind(min(others))} that its {MANIFEST} does not list; take it "
            f"away, or, if the folder is yours to change, take {MANIFEST} away"
        )


def is_made(folder: Path) -> bool:
    """Whether a run committed this folder, and it is no link to one."""
    try:
        return files.is_folder(folder) and files.is_plain(folder / MANIFEST) and bool(_listed(folder))
    except (OSError, ValueError):
        return False


def discard(folder: Path) -> None:
    """Not under its own name, so that no half of a folder is ever taken for the whole.

    What the disk refuses is named once, and stays.
    """
    if not is_made(folder):
        return
    work = _temporary(folder, secrets.token_hex(4))
    try:
        begin(work)
        folder.rename(work / DISCARDED)
    except OSError as error:
        files.say_once(f"{folder} could not be removed ({error.strerror}): remove it yourself")
    with contextlib.suppress(OSError):  # the next start tries again
        clear(work)


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file that the manifest names; ValueError where it is none that was written here."""
    try:
        listing = json.loads((folder / MANIFEST).read_text())["files"]
        found = {name: (entry["bytes"], entry["sha256"]) for name, entry in listing.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is none that a run wrote") from error
    if not found:
        raise ValueError("it lists no files")
    for name, (size, sha256) in found.items():
        if type(size) is not int or not isinstance(sha256, str) or not SHA256.fullmatch(sha256):
            raise ValueError("it is none that a run wrote")
        if not _can_be_inside(name):
            raise ValueError(f"it lists {name[:60]!r}, which is no file of this folder")
    return found


def _can_be_inside(name: str) -> bool:
    """Whether it is the one spelling of a file below the folder, and not its manifest."""
    parts = Path(name).parts
    plain = "/".join(parts) == name and name.isprintable() and name != MANIFEST
    return plain and parts != () and ".." not in parts and max(map(len, parts)) <= 255


def _is_inside(folder: Path, name: str) -> bool:
    """Whether no link leads elsewhere on the way."""
    return all(files.is_folder(folder / parent) for parent in Path(name).parents if parent.name)


def _obstacle(folder: Path) -> str | None:
    """Why nothing more can be written there; libraries hide the disk's answer behind errors of their own."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.strerror
    return None


def _temporary(folder: Path, token: str) -> Path:
    return folder.parent / f"{TEMPORARY}{folder.name}-{token}"


def begin(work: Path) -> None:
    work.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir()
    (work / OWNER).touch()
    (work / NEW).mkdir()


def _commit(work: Path, folder: Path) -> None:
    place = work / NEW
    written = [path for path in sorted(place.rglob("*")) if path.is_file()]
    seen = distributed.gather_objects({str(path.relative_to(place)): path.stat().st_size for path in written})
    sizes = {name: size for part in seen for name, size in part.items()}  # a shared disk may show one rank less
    checksums = _checksums(place, sizes, flush=True)
    if not distributed.is_main():
        return
    listing = {name: {"bytes": size, "sha256": checksums[name]} for name, size in sizes.items()}
    (place / MANIFEST).write_text(json.dumps({"files": listing}, indent=1))
    for path in [place / MANIFEST, *(path for path in place.rglob("*") if path.is_dir()), place]:
        _flush(path)
    if is_made(folder):
        folder.rename(work / OLD)
    elif os.path.lexists(folder):
        files.keep(folder)
    place.rename(folder)
    for parent in (folder.parent, folder.parent.parent):  # the second where this is the first folder in the first
        _flush(parent)
    with contextlib.suppress(OSError):  # the next start tries again
        clear(work)


def clear(work: Path) -> None:
    """Remove a temporary folder of a run, once what it had put aside is back in its place or gone."""
    owner = work / OWNER
    named = STUMP.fullmatch(work.name)
    if named is not None and files.is_plain(owner):
        original = work.with_name(named[1])
        if files.is_folder(work / OLD) and not os.path.lexists(original):  # a crash between two renames
            (work / OLD).rename(original)
        for part in (OLD, DISCARDED):
            if files.is_folder(work / part):
                _remove_listed(work / part, original)
        if files.is_folder(work / NEW):
            shutil.rmtree(work / NEW)
        owner.unlink()
    work.rmdir()


def _remove_listed(folder: Path, original: Path) -> None:
    """Remove the files that the manifest lists; the others stay, in a folder that says so by its name."""
    listed = _listed(folder) if is_made(folder) else {}
    for name, (size, _) in listed.items():
        path = folder / name
        if _is_inside(folder, name):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                if files.is_plain(path) and path.stat().st_size == size:
                    path.unlink()
    for path in sorted((path for path in folder.rglob("*") if files.is_folder(path)), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    left = [path.name for path in folder.iterdir()]
    if listed and left == [MANIFEST]:
        (folder / MANIFEST).unlink()
        left = []
    if not left:  # as it also is after a crash at this line
        folder.rmdir()
    else:
        kept = folder.rename(original.parent / folder.parent.name.removeprefix(TEMPORARY))
        files.keep(kept, original.name)


def is_stump(path: Path) -> bool:
    """Whether a run made this temporary folder; one without a marker is of a run that ended before its first file."""
    if STUMP.fullmatch(path.name) is None:
        return False
    try:
        return files.is_folder(path) and (files.is_plain(path / OWNER) or not any(path.iterdir()))
    except OSError:
        return False


def _checksums(folder: Path, sizes: dict[str, int], *, flush: bool = False) -> dict[str, str]:
    """sha256 of each file; every rank reads a share, so that none waits long, and all learn all or fail together."""
    found: dict[str, str] = {}
    failure = None
    for name in sorted(sizes, key=sizes.__getitem__)[distributed.rank() :: distributed.world_size()]:
        try:
            if flush:
                _flush(folder / name)
            found[name] = _sha256(folder / name)
        except OSError as error:
            failure = error
    everywhere = {name: sum_ for part in distributed.gather_objects(found) for name, sum_ in part.items()}
    if len(everywhere) < len(sizes):
        raise failure or OSError(f"another rank could not flush and read its share of {folder}")
    return everywhere


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
