"""Tensors of a safetensors checkpoint by name, one at a time."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rayward.errors import ModelLoadError
from rayward.model.weights import weight_map


class TensorFiles:
    """The weights in a directory; a context manager that opens a file when a tensor of it is read, and closes all at its end.

    Attributes:
        names: of the tensors, file by file.

    Raises:
        ModelLoadError: there are no safetensors, or they cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = weight_map(directory)
        self.names = sorted(self._file_of, key=lambda name: self._file_of[name])
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, name: str) -> Tensor:
        """The whole tensor, as it is stored.

        Raises:
            ModelLoadError: its file cannot be read.
        """
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(self.directory / file, framework="pt"))
            return cast(Tensor, self._open[file].get_tensor(name))
        except (OSError, SafetensorError) as exc:
            raise ModelLoadError(f"{self.directory / file} cannot be read ({exc})", remedy="restore it, or export the model again") from exc
