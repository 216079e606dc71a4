"""The errors of this package; each is also the builtin exception that a caller would catch."""


class SafemapError(Exception):
    """Base class of every error that this package raises on purpose."""


class FormatError(SafemapError, ValueError):
    """A file breaks a rule of its format, or is no checkpoint at all."""


class MissingTensorError(SafemapError, KeyError):
    """No tensor of this name."""

    def __str__(self) -> str:  # KeyError would print the quoted repr of its argument
        return str(self.args[0]) if self.args else ""


class DuplicateTensorError(SafemapError, ValueError):
    """Two files hold a tensor of the same name."""


class MissingFileError(SafemapError, FileNotFoundError):
    """No such file, a folder or pattern without weights, or a shard that an index names is absent."""


class FileChangedError(SafemapError, OSError):
    """A file was truncated, edited or replaced after it was opened."""


class ClosedMapError(SafemapError, ValueError):
    """The map was closed."""


class UnsupportedTensorError(SafemapError, TypeError):
    """The installed torch cannot hold a tensor of this dtype or shape."""


class MismatchError(SafemapError, ValueError):
    """A destination has another shape than the stored tensor, or a dtype that would lose part of it."""


class ConverterError(SafemapError, TypeError):
    """A state-dict converter failed, or did something that reading by name cannot follow."""
