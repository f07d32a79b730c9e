"""Read secrets from files. Knows no setting."""

from pathlib import Path

from websocket_relay.outcomes import RelayError

MAX_BYTES = 65_536


class SecretFileError(RelayError):
    """A file contains no usable secret. The message names the file and has one line."""


def read_secret(file: str) -> str:
    """Return the text of a file, without the newline at its end.

    Raises:
        SecretFileError: the file can't be read, is empty, or is no text of at most 64 KiB.
    """
    shown = file if _has_directory(file) else "the value (not shown)"  # it may be the secret itself
    try:
        if not Path(file).is_file():  # opening a FIFO, for example, would block
            raise SecretFileError(f"{shown}: no such file")
        with Path(file).open("rb") as opened:
            content = opened.read(MAX_BYTES + 1)
        text = content.decode().rstrip("\r\n")
    except OSError as error:
        raise SecretFileError(f"{shown}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SecretFileError(f"{shown}: not a text in UTF-8") from None
    except ValueError:  # a NUL byte in the name
        raise SecretFileError(f"{shown}: no such file") from None
    if not text or len(content) > MAX_BYTES:
        raise SecretFileError(f"{shown}: {'longer than 64 KiB' if text else 'empty'}")
    return text


def _has_directory(file: str) -> bool:
    try:
        return file.isprintable() and "/" in file and Path(file).parent.is_dir()
    except OSError:  # for example, the name is too long
        return False
