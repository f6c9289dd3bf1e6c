"""Opening a source model: its index, and the header of every file of weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nanorun.errors import ModelError
from nanorun_converters.source.files import Files, LocalFiles, MissingFile, Store
from nanorun_converters.source.safetensors_header import read_header
from nanorun_converters.source.source_model import (
    UNKNOWN_DTYPE,
    SourceModel,
    SourceTensor,
    read_json,
)

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
        index = files.find(INDEX_FILE)
        tensors = _single(files) if index is None else _indexed(files, index, needs_weights)
    except OSError as error:
        raise ModelError(f"{files.where}: {error.strerror or error}", facts=[str(error)]) from error
    stores = {tensor.store.name: tensor.store for tensor in tensors.values()}
    return SourceModel(files, tensors, tuple(stores[name] for name in sorted(stores)))


def _single(files: Files) -> dict[str, SourceTensor]:
    """The tensors of a source model without an index, which has one file of weights."""
    names = [name for name in files.names() if name.endswith(SUFFIX)]
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
    file_of = read_json(store, where).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ModelError(f"{where}: expected an object weight_map, found {file_of!r:.60}")
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
    entries = read_header(_Start(store), store.n_bytes, str(files.where / store.name))
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
