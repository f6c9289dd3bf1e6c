"""Opening a source model: its index, and the header of every file of weights."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nanorun.errors import ModelError
from nanorun_converters.source.files import Files, LocalFiles, MissingFile, Store
from nanorun_converters.source.policy import refuse_other_kinds
from nanorun_converters.source.safetensors_header import read_header
from nanorun_converters.source.source_model import (
    UNKNOWN_DTYPE,
    SourceModel,
    SourceTensor,
    read_json,
    refuse_look_alike,
)
from nanorun_converters.source.wrappers import without_wrappers

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SUFFIX = ".safetensors"


def open_source(source: Path | Files, *, needs_weights: bool = True) -> SourceModel:
    """Read the index and the header of every file of weights.

    Args:
        source: The folder of a source model, or its files elsewhere.
        needs_weights: Whether the files that an index names must be there; a plan does without.

    Raises:
        ModelError: If there is no whole source model.
    """
    if isinstance(source, Path) and not source.is_dir():
        found = "a file" if source.exists() else "nothing there"
        raise ModelError(f"{source}: expected the folder of a source model, found {found}")
    files = LocalFiles(source) if isinstance(source, Path) else source
    try:
        names, notes = files.names(), list[str]()
        refuse_other_kinds(files, names)
        index = files.find(INDEX_FILE)
        if index is None:
            tensors = _single(files, names)
        else:
            tensors = _choose(files, index, needs_weights, notes)
    except OSError as error:
        raise ModelError(f"{files.where}: {error.strerror or error}", facts=[str(error)]) from error
    stores = {tensor.store.name: tensor.store for tensor in tensors.values()}
    notes += _passed_over(files, names, stores)
    own = without_wrappers(tensors, str(files.where))
    return SourceModel(files, own, tuple(stores[name] for name in sorted(stores)), notes)


def _passed_over(files: Files, names: Sequence[str], used: Container[str]) -> list[str]:
    """What to say of files of weights that nothing is taken from."""
    others = [name for name in names if name.endswith(SUFFIX) and name not in used]
    return [f"{files.where / name}: passed over, no tensor is taken from it" for name in others]


def _choose(
    files: Files, index: Store, needs_weights: bool, notes: list[str]
) -> dict[str, SourceTensor]:
    """The tensors of the index's files or of a whole file beside them, whichever is meant.

    One of the two is left from before the model was saved again. What is not complete cannot be
    meant; of two that are, the newer one is.
    """
    whole = files.find(SINGLE_FILE)
    named = _files_of(index, str(files.where / INDEX_FILE))
    if whole is None or whole.name in named:
        return _indexed(files, index, needs_weights)
    missing = [name for name in named if files.find(name) is None]
    if missing:
        notes.append(
            f"{files.where / INDEX_FILE}: passed over: it names {missing[0]}, which is not there;"
            f" {SINGLE_FILE} is taken"
        )
        return _tensors_in(files, whole)
    try:
        in_whole = _tensors_in(files, whole)
    except ModelError as error:
        notes.append(f"{error.message}: passed over, the files of {INDEX_FILE} are taken")
        return _indexed(files, index, needs_weights)
    dates = [files.modified(name) for name in named]
    ages = [date for date in dates if date is not None]
    own = files.modified(SINGLE_FILE)
    in_shards = _indexed(files, index, needs_weights)
    if own is None or not ages or own == max(ages):
        return _same_or_refuse(files, in_shards, in_whole, notes)
    newer, older = (SINGLE_FILE, INDEX_FILE) if own > max(ages) else (INDEX_FILE, SINGLE_FILE)
    notes.append(f"{files.where / older}: passed over: {newer} is another set of weights, newer")
    return in_whole if newer == SINGLE_FILE else in_shards


def _same_or_refuse(
    files: Files,
    in_shards: dict[str, SourceTensor],
    whole: dict[str, SourceTensor],
    notes: list[str],
) -> dict[str, SourceTensor]:
    """The tensors, where two sets of weights of the same age are alike by their headers."""
    shapes = [{n: (t.dtype, t.shape) for n, t in each.items()} for each in (in_shards, whole)]
    if shapes[0] == shapes[1]:
        notes.append(
            f"{files.where / SINGLE_FILE}: passed over: {INDEX_FILE} names as many tensors"
        )
        return in_shards
    raise ModelError(
        f"{files.where}: {INDEX_FILE} and {SINGLE_FILE} are two sets of weights that disagree",
        facts=[
            f"{len(in_shards)} tensors by the index, {len(whole)} in {SINGLE_FILE}, no newer one",
            "remove or rename the one that is not meant",
        ],
    )


def _single(files: Files, names: Sequence[str]) -> dict[str, SourceTensor]:
    """The tensors of a source model without an index, which has one file of weights."""
    names = [name for name in names if name.endswith(SUFFIX)]
    if SINGLE_FILE in names:
        names = [SINGLE_FILE]
    store = files.find(names[0]) if names else None
    if store is None:
        _refuse(files, SINGLE_FILE, "no safetensors file")
    if len(names) > 1:
        _refuse(files, INDEX_FILE, f"{len(names)} safetensors files and no index")
    return _tensors_in(files, store)


def _refuse(files: Files, expected: str, found: str) -> NoReturn:
    raise ModelError(f"{files.where}: expected {expected}, found {found}")


def _indexed(files: Files, store: Store, needs_weights: bool) -> dict[str, SourceTensor]:
    """The tensors that the index names, each from the file it names."""
    where = str(files.where / INDEX_FILE)
    file_of = _weight_map(store, where)
    stores = {file: files.find(file) for file in _unique(file_of, where)}
    missing = [file for file, found in stores.items() if found is None]
    if missing and needs_weights:
        raise ModelError(
            f"{files.where / missing[0]}: expected this file of weights, found nothing there",
            facts=[f"{INDEX_FILE} names it"],
        )
    by_file = _headers(files, [found for found in stores.values() if found is not None])
    for file in missing:
        names = [name for name, its_file in file_of.items() if its_file == file]
        by_file[file] = _assumed_in(file, names)
    for name, file in file_of.items():
        if name not in by_file[file]:
            raise ModelError(
                f"{files.where / file}: expected tensor {name!r}, found no such tensor"
            )
    return {name: by_file[file][name] for name, file in file_of.items()}


def _weight_map(store: Store, where: str) -> dict[str, Any]:
    file_of = read_json(store, where).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ModelError(f"{where}: expected an object weight_map, found {file_of!r:.60}")
    return file_of


def _files_of(index: Store, where: str) -> list[str]:
    return _unique(_weight_map(index, where), where)


def _headers(files: Files, stores: Sequence[Store]) -> dict[str, dict[str, SourceTensor]]:
    """The tensors of each file, read at once where they lie afar: a header is a few round trips."""
    with ThreadPoolExecutor(1 + files.n_reads_ahead, thread_name_prefix="header") as pool:
        try:
            found = list(pool.map(partial(_tensors_in, files), stores))
        except BaseException:
            files.give_up()
            pool.shutdown(cancel_futures=True)
            raise
    return {store.name: tensors for store, tensors in zip(stores, found, strict=True)}


def _unique(file_of: dict[str, Any], where: str) -> list[str]:
    for name, file in file_of.items():
        # A plain name only: an index must not reach outside its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ModelError(
                f"{where}: tensor {name!r}: expected the name of a safetensors file,"
                f" found {file!r:.80}"
            )
    return sorted(set(file_of.values()))


def _assumed_in(file: str, names: list[str]) -> dict[str, SourceTensor]:
    store = MissingFile(file)
    return {name: SourceTensor(name, store, UNKNOWN_DTYPE, (), 0, 0) for name in names}


def _tensors_in(files: Files, store: Store) -> dict[str, SourceTensor]:
    where = str(files.where / store.name)
    try:
        entries = read_header(_Start(store), store.n_bytes, where)
    except ModelError:
        refuse_look_alike(store, where, "a safetensors file")
        raise
    return {
        name: SourceTensor(entry.name, store, entry.dtype, entry.shape, entry.offset, entry.n_bytes)
        for name, entry in entries.items()
    }


@dataclass(slots=True)
class _Start:
    """A file read from its start on."""

    store: Store
    offset: int = 0

    def read(self, n_bytes: int) -> bytes:
        """The next `n_bytes`, fewer at the end."""
        n_bytes = min(n_bytes, self.store.n_bytes - self.offset)
        data = self.store.read(self.offset, n_bytes).tobytes()
        self.offset += n_bytes
        return data
